"""A file that belongs to another command line is recognised by its settings, and the error names
the command that takes it."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Literal

import ostro
from ostro.compat.gpt3.settings import Gpt3ModelConfig, Gpt3TrainingConfig
from ostro.compat.nanogpt.settings import NanoGptConfig
from ostro.config import script_folders
from ostro.config.files import Reader
from ostro.config.nodes import Mapping
from ostro.core.errors import ConfigError
from ostro.lm_config import TrainLmConfig
from ostro.runtime.commands import CommandLine, typed_program

Kind = Literal["native", "nanogpt", "gpt3 model", "gpt3 training"]

_CLASSES: dict[Kind, type] = {
    "native": TrainLmConfig,
    "nanogpt": NanoGptConfig,
    "gpt3 model": Gpt3ModelConfig,
    "gpt3 training": Gpt3TrainingConfig,
}
_TITLES: dict[Kind, str] = {
    "native": "is a configuration of `ostro train`",
    "nanogpt": "is a configuration of nanoGPT's `train.py`",
    "gpt3 model": "is a GPT-3 style model file",
    "gpt3 training": "is a GPT-3 style training file",
}
_SUFFIXES = (".yaml", ".yml", ".py")
# What stands behind another flag is a prompt, an output, or data.
_BEFORE_FILES = {"config_path", "config", "training_config", "dry_run", "trust", "debug"}


def kind_of(path: str, wanted: Sequence[Kind]) -> Kind:
    """Whose settings a file holds: the first `wanted` unless it has more of another kind's."""
    if path.endswith(".py"):
        return "nanogpt"
    tree = Reader([]).file(path)
    keys = set(tree.items) if isinstance(tree, Mapping) else set()
    known = {kind: len(keys & {f.name for f in fields(cls)}) for kind, cls in _CLASSES.items()}
    best = max(known, key=lambda kind: known[kind])
    as_wanted = max(wanted, key=lambda kind: known[kind])
    return best if known[best] > known[as_wanted] else as_wanted


@contextlib.contextmanager
def recognising(argv: Sequence[str], *wanted: Kind) -> Iterator[None]:
    """A `ConfigError` from inside becomes one that says whose file was given, where that is why."""
    try:
        yield
    except ConfigError as error:
        found = {path: kind_of(path, wanted) for path in _files(argv)}
        other = {path: kind for path, kind in found.items() if kind not in wanted}
        if "gpt3 model" in wanted and not other:
            _check_flags(argv, found)
        if not other:
            raise
        raise ConfigError(_advice(other)) from error


def _check_flags(argv: Sequence[str], found: dict[str, Kind]) -> None:
    """Refuse a model file in the place of a training file, and the other way round."""
    flags: dict[Kind, str] = {"gpt3 model": "--config", "gpt3 training": "--training_config"}
    words = ["", *(word for text in argv for word in text.split("=", 1))]
    wrong = [
        f"{given if given.startswith('--') else ''} {path} - {_TITLES[kind]} - give it as"
        f" {flags[kind]} {path}"
        for given, path in pairwise(words)
        if (kind := found.get(path)) is not None and flags[kind] != given
    ]
    if wrong:
        raise ConfigError("\n".join(line.lstrip() for line in wrong))


def _files(argv: Sequence[str]) -> list[str]:
    """The words that are files, in places where a configuration may stand."""
    values = []
    for before, word in pairwise(["", *argv]):
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        is_flag = flag.startswith("--") and "=" not in flag
        if equals and (not is_flag or flag.removeprefix("--") in _BEFORE_FILES):
            values.append(value)
    return [value for value in values if value.endswith(_SUFFIXES) and Path(value).is_file()]


def _advice(found: dict[str, Kind]) -> str:
    """What the files are, and what to type for them."""
    lines = [f"{path} - {_TITLES[kind]}" for path, kind in found.items()]
    if (command := _train_command(found)) is not None:
        lines.append(f"  train with it:        {command}")
    if "native" not in found.values():
        source = "nanogpt" if "nanogpt" in found.values() else "gpt3"
        words = ("translate", "--from", source, *_in_order(found), "--output", "native.yaml")
        command = CommandLine((*typed_program(["ostro"]), "config"), words)
        lines.append(f"  make a native one:    {command}")
    return "\n".join(lines)


def _in_order(found: dict[str, Kind]) -> list[str]:
    return sorted(found, key=lambda path: list(_CLASSES).index(found[path]))


def _train_command(found: dict[str, Kind]) -> CommandLine | None:
    by_kind = {kind: path for path, kind in found.items()}
    if "native" in by_kind:
        return CommandLine(
            (*typed_program(["ostro"]), "train"), ("--config_path", by_kind["native"])
        )
    is_gpt3 = "nanogpt" not in by_kind
    # Told apart by what lies beside them: both scripts are called train.py.
    folder, beside = ("src", "infer.py") if is_gpt3 else ("", "sample.py")
    roots = [Path(), *script_folders(), Path(ostro.__file__).parents[2]]
    roots = [root for root in roots if (root / folder / beside).is_file()]
    script = next((root / folder / "train.py" for root in roots), None)
    if script is None:  # an installed package has no scripts
        return None
    python = "python3" if is_gpt3 else "python"
    program = typed_program([python, str(script)], argv=[""], orig=[])
    if not is_gpt3:
        return CommandLine(program, (by_kind["nanogpt"],))
    model = ("--config", by_kind["gpt3 model"]) if "gpt3 model" in by_kind else ()
    training = by_kind.get("gpt3 training")
    words = model or ("--model_size", "125M")
    return CommandLine(program, (*words, *(("--training_config", training) if training else ())))
