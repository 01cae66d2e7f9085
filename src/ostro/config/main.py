"""`ostro.config.main(train)()`: run a function whose argument is a config dataclass."""

import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ostro.config.aliases import Alias
from ostro.config.files import script_folders
from ostro.config.help import help_text
from ostro.config.loading import load
from ostro.core.errors import ConfigError, OstroError
from ostro.core.redaction import redact

_FILE_FLAGS = ("--config_path", "--config", "--configs")


def main(
    fn: Callable | None = None,
    *,
    aliases: Sequence[Alias] = (),
    search: Sequence[Path] | None = None,
) -> Callable:
    """Make `fn(config: SomeConfig)` read its argument from the command line.

    `main(train)()` or `@main`. Reads `--config_path FILE` and `--a.b value` from `sys.argv`;
    `--help` lists the settings, `--debug` shows tracebacks, `--trust` imports what a file from a
    checkpoint or a URL names under `imports`. A mistake of the user ends with
    its message and exit code 2. Called with arguments, the function is as it was.
    """
    if fn is None:
        return functools.partial(main, aliases=aliases, search=search)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return fn(*args, **kwargs)
        words = sys.argv[1:]
        debug = "--debug" in words
        cls = _config_class(fn)
        if "--help" in words or "-h" in words:
            print(help_text(cls))
            raise SystemExit(0)
        try:
            trust = "--trust" in words
            files, flags = _split([word for word in words if word not in ("--debug", "--trust")])
            folders = script_folders() if search is None else search
            loaded = load(cls, files, flags, aliases=aliases, search=folders, trust=trust)
            for notice in loaded.notices:
                print(notice, file=sys.stderr)
            return fn(loaded.config)
        except OstroError as error:
            if debug:
                print(redact(traceback.format_exc()), file=sys.stderr)
            else:
                print(error, file=sys.stderr)
            raise SystemExit(2) from None

    return run


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words as configuration files and the flags that are left."""
    files, flags, rest = [], [], list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in _FILE_FLAGS:
            flags.append(name + equals + value)
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
            if name != "--configs":
                break
        if not values or "" in values:
            raise ConfigError(f"{name} needs the name of a file: {name} config/run.yaml")
        files += values
    return files, flags


def _config_class(fn: Callable) -> type:
    parameters = list(inspect.signature(fn).parameters)
    assert parameters, f"{fn.__name__} must take the configuration as its first parameter"
    cls = get_type_hints(fn).get(parameters[0])
    assert is_dataclass(cls) and isinstance(cls, type), (
        f"the first parameter of {fn.__name__} must be annotated with a dataclass"
    )
    return cls
