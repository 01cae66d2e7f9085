"""`python sample.py key=value`: text from a checkpoint, with nanoGPT's settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ostro.cli.arguments import sampling_flags
from ostro.cli.nanogpt import read_python, split
from ostro.cli.native import open_checkpoint, saved_config
from ostro.cli.recognise import recognising
from ostro.compat.nanogpt.settings import GPT2_SIZES
from ostro.config import help_text, load, script_folders
from ostro.core.errors import ConfigError, Problem, at_least, seed_problems
from ostro.data.tokenizer import Tokenizer
from ostro.data.tokenizer_config import Gpt2Tokenizer
from ostro.distributed import pick_device
from ostro.generate.sampling import SamplingConfig, complete_all
from ostro.models.hf import read_model, read_weights
from ostro.models.lm_model import LmModel
from ostro.runtime.signals import Signals
from ostro.train_lm import load_model, load_tokenizer
from ostro.trainer.state import load_weights

_USAGE = "usage: python sample.py [config.yaml | config.py] [key=value ...]\n"


@dataclass(frozen=True)
class NanoGptSampleConfig:
    """Settings of `sample.py`."""

    init_from: str = "resume"
    """resume (`out_dir/ckpt.pt`), or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    out_dir: str = "out"
    """Folder of the checkpoint."""
    start: str = "\n"
    """Text to go on with; `FILE:prompt.txt` reads it from a file."""
    num_samples: int = 10
    """Samples to draw."""
    max_new_tokens: int = 500
    """Tokens of each sample."""
    temperature: float = 0.8
    """Below 1 likelier tokens win more often."""
    top_k: int = 200
    """Choose among this many of the likeliest tokens."""
    seed: int = 1337
    """Seed of the draws."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the computation."""
    compile: bool = False
    """Compile the model first."""
    imports: list[str] = field(default_factory=list)
    """Python modules to import first."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(1, self, "num_samples")
        yield from seed_problems(self, "seed")
        if self.init_from != "resume" and self.init_from not in GPT2_SIZES:
            yield Problem("init_from", f"must be resume or one of {', '.join(GPT2_SIZES)}")


def sample(argv: list[str], signals: Signals) -> None:
    """Print samples, divided by lines of dashes, as nanoGPT's `sample.py` does."""
    if "-h" in argv or "--help" in argv:
        print(_USAGE)
        print(help_text(NanoGptSampleConfig))
        return
    with recognising(argv, "nanogpt"):
        config = _load(argv)
    sampling = SamplingConfig(config.max_new_tokens, config.temperature, config.top_k)
    model, tokenizer = _model(config, pick_device(config.device))
    if config.compile:
        model.compile()
    prompts = [_start(config)] * config.num_samples
    for text in complete_all(model, tokenizer, prompts, replace(sampling, seed=config.seed)):
        print(text)
        print("---------------")


def _load(argv: list[str]) -> NanoGptSampleConfig:
    """The settings; of native ones those that a run's configuration has for sampling."""
    files, flags, native = split(argv)
    search = script_folders()
    layers = [read_python(name, search) for name in files if name.endswith(".py")]
    names = [name for name in files if not name.endswith(".py")]
    flags += sampling_flags(native)
    return load(NanoGptSampleConfig, names, flags, layers=layers, search=search).config


def _start(config: NanoGptSampleConfig) -> str:
    if not config.start.startswith("FILE:"):
        return config.start
    path = Path(config.start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(Problem("start", f"cannot be read: {error}", "", config.start)) from error


def _model(config: NanoGptSampleConfig, device: torch.device) -> tuple[LmModel, Tokenizer]:
    if config.init_from != "resume":
        tokenizer, name = Gpt2Tokenizer().build(), f"openai-community/{config.init_from}"
        model_config = read_model(name, False)
        with torch.device(device):
            model = model_config.build(tokenizer.vocab_size, getattr(torch, config.dtype))
        load_weights(model, read_weights(name, model_config, tokenizer.vocab_size), name)
        return model.eval(), tokenizer
    saved = open_checkpoint(f"{config.out_dir}/ckpt.pt", "out_dir")
    tokenizer = load_tokenizer(saved)
    run = saved_config(saved, None, [f"--trainer.mp=p=float32,c={config.dtype}"])
    return load_model(saved, run, tokenizer, device), tokenizer
