"""nanoGPT's settings (github.com/karpathy/nanoGPT), and what each means natively."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ostro.compat.translation import Translation, ratio
from ostro.config import Loaded
from ostro.core.errors import ConfigError, Problem, at_least, seed_problems
from ostro.core.redaction import Location, local_path
from ostro.distributed.launchers import find_rank_info
from ostro.models.hf import read_settings

DEFAULT_FILE = "train_config.yaml"
GPT2_SIZES = {
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}  # fmt: skip
"""Layers, heads and width of OpenAI's models."""
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "bias")
_PADDED_VOCAB = 50304  # GPT-2's 50,257, rounded up to a multiple of 64


@dataclass(frozen=True)
class NanoGptConfig:
    """Settings of `train.py`. The defaults train a GPT-2 (124M)."""

    out_dir: Location = "out"
    """Folder of checkpoints and logs; made if it is missing."""
    log_interval: int = 1
    """Iterations between two lines on the console and in `train.log`."""
    eval_interval: int = 2000
    """Iterations between two evaluations; each may save a checkpoint."""
    eval_iters: int = 200
    """Batches of each evaluation, for the training and the validation loss."""
    eval_only: bool = False
    """Evaluate once and stop."""
    always_save_checkpoint: bool = True
    """Save after every evaluation; false: only when the validation loss is the lowest so far."""
    init_from: str = "scratch"
    """scratch, resume (from `out_dir`), or gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
    with Hugging Face weights."""
    wandb_log: bool = False
    """Also log to Weights & Biases."""
    wandb_project: str = "austen-gpt"
    """Project on Weights & Biases."""
    wandb_run_name: str = "gpt2-austen-12layer"
    """Name of the run on Weights & Biases."""
    dataset: str = "austen"
    """Reads `data/<dataset>/train.bin` and `val.bin`."""
    batch_size: int = 12
    """Sequences computed at once, on each device."""
    block_size: int = 1024
    """Tokens of a sequence."""
    gradient_accumulation_steps: int = 40
    """Micro-batches of one update, on each device."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads of a block; divides `n_embd`."""
    n_embd: int = 768
    """Width of the hidden state."""
    dropout: float = 0.0
    """Dropout probability everywhere."""
    bias: bool = False
    """Biases in linear layers and norms."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    max_iters: int = 600_000
    """Updates to make."""
    weight_decay: float = 1e-1
    """Decay of all parameters of two or more dimensions, embeddings included."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of squared gradients."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    decay_lr: bool = True
    """Warm-up and cosine decay; false keeps `learning_rate` throughout."""
    warmup_iters: int = 2000
    """Iterations of the warm-up."""
    lr_decay_iters: int = 600_000
    """Iteration at which the decay ends; usually `max_iters`."""
    min_lr: float = 6e-5
    """Learning rate at the end of the decay; usually a tenth of `learning_rate`."""
    backend: Literal["nccl", "gloo"] = "nccl"
    """Library that joins the processes of torchrun: nccl for CUDA devices, gloo for others."""
    device: str = "cuda"
    """cpu, cuda, cuda:1, mps; with torchrun each process gets a GPU of its own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the computation; weights stay float32. float16 uses a gradient scaler."""
    compile: bool = True
    """Compile with torch.compile: up to a minute at the start, then often a tenth to a third
    faster. It pays from some hundred iterations on."""
    seed: int = 1337
    """Seed of the initial weights, the data and dropout."""

    def problems(self) -> Iterator[Problem]:
        counts = ("batch_size", "gradient_accumulation_steps", "n_layer", "n_head", "n_embd")
        yield from at_least(1, self, *counts)
        if self.n_head > 0 and self.n_embd % self.n_head:
            yield Problem("n_embd", f"must be divisible by n_head = {self.n_head}", "change one")
        yield from at_least(0, self, "min_lr", "warmup_iters")
        yield from seed_problems(self, "seed")
        if self.max_iters < 1 and not self.eval_only:
            yield Problem("max_iters", "must be at least 1", "eval_only=True only evaluates")


# Keys whose value is that of a native setting.
SAME = {
    "log_interval": ("trainer.log_interval",),
    "eval_interval": ("trainer.steps_per_eval",),
    "eval_iters": ("trainer.max_eval_batches",),
    "eval_only": ("trainer.eval_only",),
    "batch_size": ("trainer.per_device_parallelism", "trainer.per_device_eval_parallelism"),
    "seed": ("trainer.seed",),
    "compile": ("trainer.compile",),
    "dropout": ("model.embed_pdrop", "model.resid_pdrop", "model.attn_pdrop"),
    "learning_rate": ("optimizer.learning_rate",),
    "weight_decay": ("optimizer.weight_decay",),
    "beta1": ("optimizer.beta1",),
    "beta2": ("optimizer.beta2",),
}
MODEL = {
    "n_layer": "model.num_layers",
    "n_head": "model.num_heads",
    "n_embd": "model.hidden_dim",
    "block_size": "model.seq_len",
    "bias": "model.use_bias",
}
# What nanoGPT does and no key of its says.
_ALWAYS = {
    "trainer.eval_when": "before",
    "trainer.progress": True,
    "trainer.checkpointer.format": "nanogpt",
    "trainer.checkpointer.save_interval": None,
    "trainer.checkpointer.keep": [],
    "trainer.checkpointer.save_last": False,
    "data.sampling": "windows",
    "data.evaluate_train": True,
    "model.type": "gpt2",
    "model.activation_function": "gelu",
    "model.gradient_checkpointing": False,
    "trainer.fsdp_axis": None,  # DistributedDataParallel
    "optimizer.type": "adam",
    "optimizer.warmup_offset": 1,
    "optimizer.decay_mask": "all_2d",
}


def translate(
    loaded: Loaded[NanoGptConfig],
    saved: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Translation:
    """The native settings of a nanoGPT configuration.

    `saved`: the `model_args` of the checkpoint that `init_from=resume` goes on from. Raises
    `ConfigError` where a typed setting contradicts it, or names a device that is not here.
    """
    config, made = loaded.config, Translation(loaded)
    for path, value in _ALWAYS.items():
        made.set(path, value)
    for key, paths in SAME.items():
        for path in paths:
            made.set(path, getattr(config, key), key)
    _outputs(config, made)
    _model_and_data(config, made, saved)
    _learning_rate(config, made)
    num_ranks = find_rank_info(environ).num_ranks
    steps = config.batch_size * config.gradient_accumulation_steps * num_ranks
    made.set("trainer.train_batch_size", steps, "batch_size", "gradient_accumulation_steps")
    made.set("trainer.num_train_steps", max(config.max_iters, 1), "max_iters")
    clip = config.grad_clip if config.grad_clip else None
    made.set("optimizer.max_grad_norm", clip, "grad_clip")
    _device(config, made)
    return made


def _outputs(config: NanoGptConfig, made: Translation) -> None:
    made.set("trainer.log_dir", f"{config.out_dir}/.", "out_dir")
    made.set("trainer.checkpointer.base_path", f"{config.out_dir}/.", "out_dir")
    when = "always" if config.always_save_checkpoint else "improved"
    made.set("trainer.checkpointer.save_after_eval", when, "always_save_checkpoint")
    lines = {"type": "console", "style": "nanogpt", "log_every": config.log_interval}
    trackers: list[dict[str, Any]] = [{"type": "json_logger"}, lines]
    if config.wandb_log:
        names = {"project": config.wandb_project, "name": config.wandb_run_name}
        trackers.append({"type": "wandb", **names})
    keys = ("wandb_log", "wandb_project", "wandb_run_name", "log_interval")
    made.set("trainer.tracker", trackers, *keys)


def _model_and_data(
    config: NanoGptConfig, made: Translation, saved: Mapping[str, Any] | None
) -> None:
    folder = Path("data") / config.dataset
    made.set("data.source", {"type": "tokens", "dir": str(folder)}, "dataset")
    opened = Path(local_path(str(folder)))
    has_meta = any((opened / name).exists() for name in ("meta.json", "meta.pkl"))
    tokenizer = {"type": "meta", "path": str(folder)} if has_meta else {"type": "gpt2"}
    made.set("data.tokenizer", tokenizer, "dataset")
    vocab_size: int | None = None if has_meta else _PADDED_VOCAB
    given: Mapping[str, Any] = {}
    source = ""
    start = config.init_from
    if start == "resume":
        given, source = saved or {}, f"the checkpoint in {config.out_dir}"
        vocab_size = given.get("vocab_size", vocab_size)
        if "activation_function" in given:
            made.set("model.activation_function", given["activation_function"], "init_from")
    elif start in GPT2_SIZES:
        layers, heads, width = GPT2_SIZES[start]
        given = {"n_layer": layers, "n_head": heads, "n_embd": width, "bias": True}
        source, vocab_size = f"init_from = {start}", 50257
        made.set("initialize_from_hf", f"openai-community/{start}", "init_from")
    elif start != "scratch":
        if not Path(local_path(start)).is_dir():
            known = ", ".join(["scratch", "resume", *GPT2_SIZES])
            rule = f"must be one of {known}, or a folder with Hugging Face weights"
            raise ConfigError(
                Problem("init_from", rule, "", start, made.loaded.origins["init_from"])
            )
        made.set("initialize_from_hf", start, "init_from")
        described, vocab_size = read_settings(start)
        given = {key: getattr(described, path[6:]) for key, path in MODEL.items()}
        del given["block_size"]  # a shorter one cuts the table of positions
        source = f"init_from = {start}"
    if start not in ("scratch", "resume"):
        # What these weights were trained with; nanoGPT's own code takes the exact GELU here too.
        made.set("model.activation_function", "gelu_new", "init_from")
    made.set("trainer.load_checkpoint", start == "resume", "init_from")
    made.set("vocab_size", vocab_size, "dataset")
    problems = []
    for key, path in MODEL.items():
        value = getattr(config, key)
        if key in given and given[key] != value:
            if not made.is_default(key, DEFAULT_FILE):
                rule = f"{source} has {key} = {given[key]}"
                origin = made.loaded.origins[key]
                problems.append(Problem(key, rule, "leave the setting out", str(value), origin))
            value = given[key]
        made.set(path, value, key)
    if problems:
        raise ConfigError(problems)


def _learning_rate(config: NanoGptConfig, made: Translation) -> None:
    if not config.decay_lr:
        made.set("optimizer.lr_schedule", "constant", "decay_lr")
        made.set("optimizer.warmup", 0, "decay_lr")
        made.set("optimizer.min_lr_ratio", 1.0, "decay_lr")
        for key in ("warmup_iters", "lr_decay_iters", "min_lr"):
            made.ignored[key] = "decay_lr is false"
        return
    made.set("optimizer.lr_schedule", "cosine", "decay_lr")
    made.set("optimizer.warmup", config.warmup_iters, "warmup_iters")
    made.set("optimizer.schedule_steps", config.lr_decay_iters, "lr_decay_iters")
    lowest = ratio(_min_lr(config, made), config.learning_rate)
    made.set("optimizer.min_lr_ratio", lowest, "min_lr", "learning_rate")


def _min_lr(config: NanoGptConfig, made: Translation) -> float:
    """`min_lr`, or a tenth of a learning rate that somebody set below the default of it."""
    lowest, peak = config.min_lr, config.learning_rate
    if lowest <= peak:
        return lowest
    origins = made.loaded.origins
    said = f"learning_rate = {peak} ({origins['learning_rate']})"
    if not made.is_default("min_lr", DEFAULT_FILE):
        rule, advice = f"must not be above {said}", "a tenth of it is usual"
        raise ConfigError(Problem("min_lr", rule, advice, str(lowest), origins["min_lr"]))
    above = f"min_lr = {lowest} ({origins['min_lr']}) is above {said}"
    lowest = ratio(peak, 10)
    made.notices.append(f"{above}; using a tenth of it, {lowest}")
    return lowest


def _device(config: NanoGptConfig, made: Translation) -> None:
    """Set device and backend; those nobody typed are what the machine has."""
    device, backend = config.device, config.backend
    has_cuda = torch.cuda.is_available()
    advice = "type device=cpu backend=gloo"
    problems = []
    if device == "cuda" and made.is_default("device", DEFAULT_FILE):
        device = "auto"
        if not has_cuda:
            other = "mps" if torch.backends.mps.is_available() else "cpu"
            made.notices.append(f"no CUDA device here; using device={other} backend=gloo")
    if device.startswith("cuda") and not has_cuda:
        origin = made.loaded.origins["device"]
        problems.append(Problem("device", "this machine has no CUDA", advice, device, origin))
    uses_cuda = has_cuda and device.startswith(("cuda", "auto"))
    if backend == "nccl" and made.is_default("backend", DEFAULT_FILE):
        backend = "auto"
    if backend == "nccl" and not uses_cuda:
        rule = f"nccl joins CUDA devices only, and device = {config.device}"
        origin = made.loaded.origins["backend"]
        problems.append(Problem("backend", rule, advice, backend, origin))
    if problems:
        raise ConfigError(problems)
    made.set("trainer.device", device, "device")
    made.set("trainer.distributed.backend", backend, "backend")
    dtype = config.dtype
    if dtype == "bfloat16" and uses_cuda and not torch.cuda.is_bf16_supported():
        dtype = "float16"
        made.notices.append("this GPU has no bfloat16; computing in float16")
    made.set("trainer.mp", f"p=float32,c={dtype}", "dtype")


def names() -> list[str]:
    """nanoGPT's keys, in the order of its documentation."""
    return [field.name for field in fields(NanoGptConfig)]
