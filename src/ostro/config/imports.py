"""Modules that a configuration names under `imports`: they run code, so it matters who names them.

Those of a flag or of a file of the user's own are imported. A file that came with a checkpoint, or
from a URL, is somebody else's until the user says `--trust`, or names its modules with `--imports`.
"""

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ostro.config import nodes
from ostro.core.errors import ConfigError, Problem

_FOLDER = re.compile(r"step-\d+|\.(tmp|old)-.*")
_FILES = {"metadata.json", "values.json", "shards.json"}


def in_checkpoint(file: str) -> bool:
    """Whether a file lies in the folder of a checkpoint, which may be damaged or incomplete.

    Known by the folder's name (`step-100`) or by what else lies there: `metadata.json`,
    `values.json`, `shards.json`, or any `.safetensors`.
    """
    folders = {os.path.dirname(os.path.abspath(file)), os.path.dirname(os.path.realpath(file))}
    for folder in folders:
        if _FOLDER.fullmatch(os.path.basename(folder)):
            return True
        with contextlib.suppress(OSError):
            names = os.listdir(folder)
            if any(name in _FILES or name.endswith(".safetensors") for name in names):
                return True
    return False


class Modules:
    """The modules that the layers of one configuration name."""

    def __init__(self, trust: bool, problems: list[Problem]):
        """With `trust` all are imported. What cannot be is added to `problems`."""
        self._trust, self._problems = trust, problems
        self._skipped: dict[str, str] = {}  # module to origin

    def import_named(self, layer: nodes.Mapping, trusted: bool) -> None:
        """Import what a layer names, so that it can register its choices, or note that it is not:
        because of where it comes from, or as the layer is not `trusted`."""
        given = layer.items.get("imports")
        items = given.items if isinstance(given, nodes.Sequence) else [given]
        for index, node in enumerate(items):
            if not isinstance(node, nodes.Scalar) or node.is_null:
                continue
            file = node.origin.rpartition(":")[0]
            is_own = trusted and "://" not in node.origin and not (file and in_checkpoint(file))
            if self._trust or is_own:
                self._problems += _import(node.text, f"imports.{index}", node.origin)
            elif node.text not in sys.modules:  # --imports may have named it already
                self._skipped[node.text] = node.origin

    def notices(self) -> list[str]:
        """A line for each module that was not imported."""
        why = "a configuration from a checkpoint or a URL imports nothing"
        return [
            f"imports: {name} ({origin}) is not imported: {why}; add --imports {name} or --trust"
            for name, origin in self._skipped.items()
        ]

    def hint(self, is_saved: bool) -> str:
        """What to do about a type that is not known; `is_saved`: to a checkpoint's settings."""
        names = list(self._skipped)
        if not names:
            advice = "name the module that registers it: --imports my.module"
            return advice if is_saved else ""
        flag = names[0] if len(names) == 1 else f"'[{', '.join(names)}]'"
        return (
            f"{', '.join(names)} may register it, but a configuration from a checkpoint or a URL"
            f" imports nothing: add --imports {flag} if you trust that code,"
            " or --trust for all that it names"
        )


def import_modules(words: Sequence[str]) -> None:
    """Import what `--imports` names: `a`, `a,b` or `[a, b]`, each time; or a `ConfigError`."""
    names = [name.strip() for word in words for name in word.strip("[] ").split(",")]
    problems = [p for name in names if name for p in _import(name, "--imports", "command line")]
    if problems:
        raise ConfigError(problems)


def _import(name: str, setting: str, origin: str) -> list[Problem]:
    """Import a module from the working directory or where Python finds it; what is wrong."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever the module raises is the reason to show
        rule = f"cannot be imported: {type(error).__name__}: {error}"
        return [Problem(setting, rule, "", name, origin)]
    return []
