"""The command lines of `src/evaluate.py` and `src/infer.py`."""

from pathlib import Path

from ostro.checkpoint import Saved, SavedFile
from ostro.cli.arguments import Parser, sampling_flags
from ostro.cli.benchmark import add_benchmark_options, score
from ostro.cli.native import open_checkpoint, saved_config
from ostro.config import load
from ostro.core.errors import ConfigError, Problem
from ostro.distributed import pick_device
from ostro.generate.sampling import SamplingConfig, complete_all
from ostro.runtime.signals import Signals
from ostro.train_lm import load_model, load_tokenizer


def evaluate(argv: list[str], signals: Signals) -> None:
    """`evaluate.py`: scores of a checkpoint, kept in `experiments/<name>/results`."""
    parser = _parser("evaluate.py", "Score a checkpoint on benchmarks.")
    add_benchmark_options(parser)
    options, _ = parser.parse(argv)
    _check_config(options.config)
    saved = open_checkpoint(options.model_checkpoint, "--model_checkpoint")
    score(saved, options, results_folder(saved, options.config))


def infer(argv: list[str], signals: Signals) -> None:
    """`infer.py`: let a checkpoint write."""
    parser = _parser("infer.py", "Let a checkpoint go on with a text.", SamplingConfig)
    parser.add_argument("--prompt", required=True, help="text to go on with")
    parser.add_argument("--max_length", type=int, default=100, help="tokens, with the prompt's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    options, flags = parser.parse(argv)
    _check_config(options.config)
    device = pick_device(options.device)
    saved = open_checkpoint(options.model_checkpoint, "--model_checkpoint")
    tokenizer = load_tokenizer(saved)
    used = len(tokenizer.encode_prompt(options.prompt))
    if options.max_length <= used:
        rule = f"leaves no room after the prompt's {used} tokens"
        raise ConfigError(Problem("--max_length", rule, "give more", str(options.max_length)))
    room = ["--max_new_tokens", str(options.max_length - used)]
    sampling = load(SamplingConfig, [], [*sampling_flags(flags), *room]).config
    model = load_model(saved, saved_config(saved, options), tokenizer, device)
    print(complete_all(model, tokenizer, [options.prompt], sampling)[0])


def _parser(name: str, description: str, settings: type | None = None) -> Parser:
    parser = Parser("", description, settings)
    parser.prog = name
    parser.add_checkpoint("--model_checkpoint")
    about = "the model's file; what is built follows the configuration in the checkpoint"
    parser.add_argument("--config", metavar="FILE", required=True, help=about)
    return parser


def _check_config(path: str) -> None:
    if not Path(path).is_file():
        raise ConfigError(Problem("--config", "no such file", "correct the path", path))


def results_folder(saved: Saved | SavedFile, config: str) -> Path:
    """`results` of the experiment that the checkpoint lies in: `experiments/<name>/` of its path.

    Otherwise the name of the configuration is taken for the experiment's, below the current
    folder. There go the results of a remote checkpoint too.
    """
    parts = Path(saved.path).parts
    for index in reversed(range(len(parts) - 2)):
        if parts[index] == "experiments":
            above = () if "://" in saved.path else parts[:index]
            return Path(*above, "experiments", parts[index + 1], "results")
    return Path("experiments", Path(config).stem, "results")
