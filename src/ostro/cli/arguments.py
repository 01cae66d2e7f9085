"""From argv to a resolved configuration: the words all commands share."""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

from ostro.cli.aliases import NATIVE
from ostro.config import (
    Loaded,
    encode,
    format_tree,
    help_text,
    import_modules,
    load,
    script_folders,
)
from ostro.core.errors import ConfigError, OstroError, Problem
from ostro.core.redaction import redact
from ostro.distributed import rank_info_of
from ostro.distributed.launchers import find_rank_info
from ostro.inspect.plan import describe
from ostro.lm_config import TrainLmConfig, with_hf_model
from ostro.runtime.commands import Dialect
from ostro.runtime.signals import Signals
from ostro.train_lm import run

Result = TypeVar("Result")


class Parser(argparse.ArgumentParser):
    """The options of one command; every other `--a.b value` is one of the `settings`, if any.

    Mistakes are `ConfigError`s, like all others. No abbreviations.
    """

    def __init__(self, command: str, description: str, settings: type | None = TrainLmConfig):
        super().__init__(f"ostro {command}", allow_abbrev=False, add_help=False)
        self.description = description
        self.settings = settings
        self._least: dict[str, int] = {}
        self._words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        file = next((word for word in self._words if word.endswith((".yaml", ".yml"))), None)
        if file and "required: --config_path" in message:
            message = f"a file needs its flag - write --config_path {shlex.quote(file)}"
        raise ConfigError(f"{self.prog} - {message} - `{self.prog} --help` lists the options")

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own options, and the flags that are settings."""
        self.add_argument("-h", "--help", action="store_true", help="show this and stop")
        if "-h" in argv or "--help" in argv:
            self.print_help()
            if self.settings is not None:
                print("\nsettings, as flags or in a file:\n")
                print(help_text(self.settings))
            sys.exit(0)
        self._words = argv
        options, flags = self.parse_known_args(argv)
        wrong = [
            Problem(f"--{name}", f"must be at least {least}", value=str(value))
            for name, least in self._least.items()
            if (value := getattr(options, name)) is not None and value < least
        ]
        if wrong:
            raise ConfigError(wrong)
        if self.settings is None:
            self.refuse(flags)
        import_modules(getattr(options, "imports", None) or [])
        return options, flags

    def refuse(self, flags: Sequence[str]) -> None:
        """Refuse words that the command has no use for."""
        if flags:
            self.error(f"unknown option {flags[0]}")

    def add_config_path(self, required: bool = True) -> None:
        """`--config_path FILE`, also spelled `--config`."""
        about = "YAML file of settings; .yaml may be left out"
        names = ("--config_path", "--config")
        self.add_argument(*names, metavar="FILE", required=required, help=about)
        self.add_trust()

    def add_checkpoint(self, name: str = "--checkpoint") -> None:
        """`--checkpoint PATH`, or under another name."""
        about = "a checkpoint, or a folder above some: the newest is taken"
        self.add_argument(name, metavar="PATH", required=True, help=about)
        self.add_imports()

    def add_imports(self) -> None:
        """`--imports MODULE` and `--trust`: whose code may run that a checkpoint needs."""
        about = "module of your own that registers a model, say; may be repeated"
        self.add_argument("--imports", action="append", metavar="MODULE", help=about)
        self.add_trust()

    def add_trust(self) -> None:
        """`--trust`, once."""
        about = "import the modules that a configuration from a checkpoint or a URL names"
        if "--trust" not in self._option_string_actions:
            self.add_argument("--trust", action="store_true", help=about)

    def add_count(
        self, name: str, about: str, *, default: int | None = None, least: int = 1, metavar="N"
    ) -> None:
        """`--name N`, a whole number that is not below `least`."""
        self.add_argument(f"--{name}", type=int, default=default, metavar=metavar, help=about)
        self._least[name] = least


def sampling_flags(flags: Sequence[str]) -> list[str]:
    """Settings of sampling as flags of their own: `--sampling.top_k 5`, as in a run's
    configuration, is `--top_k 5`."""
    prefix = "--sampling."
    return [f"--{f.removeprefix(prefix)}" if f.startswith(prefix) else f for f in flags]


def load_run(
    path: str | None,
    flags: Sequence[str],
    text: str | None = None,
    *,
    sections: Sequence[str] | None = None,
    trust: bool = False,
) -> Loaded[TrainLmConfig]:
    """The configuration of a run from one file and flags; prints a line per alias used.

    `text`: the content of the file where it came with a checkpoint, of which only the `sections`
    are read. `trust`: import what it names under `imports`, whoever wrote it.
    """
    loaded = load(
        TrainLmConfig,
        [] if path is None else [path],
        flags,
        texts=None if path is None or text is None else {path: text},
        aliases=NATIVE,
        search=script_folders(),
        sections=sections,
        trusted=text is None,
        trust=trust,
    )
    for notice in loaded.notices if find_rank_info(os.environ).rank == 0 else ():
        print(f"note: {redact(notice)}", file=sys.stderr)
    config = with_hf_model(loaded.config)
    names = ("model", "use_hf_model_config", "initialize_from_hf")
    changed = {name: getattr(config, name) for name in names}
    changed = {k: v for k, v in changed.items() if v != getattr(loaded.config, k)}
    return loaded.derive(**changed) if changed else loaded


def start_run(
    loaded: Loaded[TrainLmConfig],
    signals: Signals,
    *,
    is_dry: bool,
    num_devices: int = 1,
    notices: Sequence[str] = (),
    dialect: Dialect | None = None,
) -> None:
    """Train, or with `is_dry` say what would happen; of several processes the first one talks.

    `dialect`: the command line in whose words it does.
    """
    talks = rank_info_of(loaded.config.trainer.distributed).rank == 0
    for notice in notices if talks else ():
        print(f"note: {redact(notice)}", file=sys.stderr)
    if not is_dry:
        with speaking(dialect):
            config, origins = loaded.config, loaded.origins
            explained(loaded, lambda: run(config, signals, origins=origins, dialect=dialect))
    elif talks:
        lines = explained(loaded, lambda: list(describe(loaded.config, num_devices)))
        print(format_tree(loaded))
        print(redact("\n".join(lines)))


@contextlib.contextmanager
def speaking(dialect: Dialect | None) -> Iterator[None]:
    """An `OstroError` from inside names settings as this command line does."""
    try:
        yield
    except OstroError as error:
        if dialect is not None:
            error.args = (dialect.spoken(str(error)),)
        raise


def explained(loaded: Loaded[TrainLmConfig], action: Callable[[], Result]) -> Result:
    """`action()`; a `ConfigError` gains the values and origins of the settings it names."""
    try:
        return action()
    except ConfigError as error:
        if not error.problems:
            raise
        raise ConfigError([_completed(loaded, problem) for problem in error.problems]) from error


def _completed(loaded: Loaded[TrainLmConfig], problem: Problem) -> Problem:
    value = encode(loaded.config)
    for key in problem.setting.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    text = problem.value or (None if value is None else str(value))
    origin = problem.origin or loaded.origins.get(problem.setting)
    return replace(problem, value=text, origin=origin)
