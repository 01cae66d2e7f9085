"""Files and flags to a resolved configuration whose leaves know their origin."""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from ostro.config import nodes
from ostro.config.aliases import Alias, alias_names, resolve_aliases
from ostro.config.convert import BAD, Converter, children, find_problems, value_text
from ostro.config.fields import choice_name, dotted_names, hints
from ostro.config.files import Reader
from ostro.config.flags import parse_flags
from ostro.errors import ConfigError, Problem

Config = TypeVar("Config")


@dataclass(frozen=True)
class Loaded(Generic[Config]):
    """A resolved configuration with the origin of every leaf."""

    config: Config
    """The configuration itself."""
    origins: dict[str, str]
    """Dotted path of each leaf to `default`, `file:line`, `--flag` or `derived`."""
    notices: list[str]
    """Lines for the user: other spellings that were read, settings that no longer count."""

    def derive(self, values: Mapping[str, Any]) -> "Loaded[Config]":
        """A copy with these leaves set; their origin is `derived`."""
        config, origins = self.config, dict(self.origins)
        for path, value in values.items():
            config = _replace(config, path.split("."), value)
            kept = {p: o for p, o in origins.items() if p != path and not p.startswith(path + ".")}
            below = {nodes.join(path, leaf): "derived" for leaf in leaf_paths(value)}
            origins = {**kept, **below}
        origins = {path: origins.get(path, "default") for path in leaf_paths(config)}
        return Loaded(config, origins, self.notices)


def load(
    cls: type[Config],
    files: Sequence[str],
    flags: Sequence[str] = (),
    *,
    aliases: Sequence[Alias] = (),
    search: Sequence[Path] = (),
    trusted: bool = True,
) -> Loaded[Config]:
    """Read the files, then the flags, over the defaults of `cls`.

    Raises one `ConfigError` with every mistake found. With `trusted=False`, and for files
    that are URLs, modules named under `imports` are not imported, and a notice says so.
    """
    problems: list[Problem] = []
    notices: list[str] = []
    names = list(dotted_names(cls))
    known = names + alias_names(aliases, names)
    reader = Reader(problems)
    read = [(reader.file(name, search), trusted) for name in files]
    read.append((parse_flags(flags, reader, known), True))
    trees = [(layer, is_trusted) for tree, is_trusted in read for layer in nodes.explode(tree)]
    layers: list[nodes.Node] = []
    for layer, is_trusted in trees:
        if not isinstance(layer, nodes.Mapping):  # a file that could not be read
            continue
        resolve_aliases(layer, aliases, notices, problems)
        if "imports" in hints(cls):
            _import_modules(layer, is_trusted, notices, problems)
        layers.append(layer)
    converter = Converter(problems, notices, known, is_partial=len(layers) < len(trees))
    config = converter.convert(cls, layers, "")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    assert config is not BAD, "a value that cannot be converted leaves a problem"
    origins = {path: converter.origin_of(path) for path in leaf_paths(config)}
    return Loaded(config, origins, notices)


def check(config: Any) -> None:
    """Run every `problems()` of a configuration built in code; raises one `ConfigError`."""
    found = [
        replace(problem, value=problem.value or value_text(config, problem.setting))
        for problem in find_problems(config)
    ]
    if found:
        raise ConfigError(list(dict.fromkeys(found)))


def leaf_paths(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of all leaves; a list or mapping of scalars, or an empty one, is one leaf."""
    parts = children(value)
    if isinstance(value, (list, tuple)) and not any(children(part) for _, part in parts):
        parts = [] if not any(is_dataclass(part) for _, part in parts) else parts
    is_choice = is_dataclass(value) and choice_name(type(value)) is not None
    if is_choice:
        yield nodes.join(path, "type")
    if not parts and not is_choice:
        yield path
    for key, part in parts:
        yield from leaf_paths(part, nodes.join(path, key))


def _replace(value: Any, parts: list[str], new: Any) -> Any:
    if not parts:
        return new
    key, rest = parts[0], parts[1:]
    if isinstance(value, dict):
        return {**value, key: _replace(value.get(key), rest, new)}
    if isinstance(value, (list, tuple)):
        items = list(value)
        items[int(key)] = _replace(items[int(key)], rest, new)
        return type(value)(items)
    return replace(value, **{key: _replace(getattr(value, key), rest, new)})


def _import_modules(
    layer: nodes.Mapping, trusted: bool, notices: list[str], problems: list[Problem]
) -> None:
    """Import what `imports` names, so that it can register its choices."""
    given = layer.items.get("imports")
    items = given.items if isinstance(given, nodes.Sequence) else [given]
    for index, node in enumerate(items):
        if not isinstance(node, nodes.Scalar) or node.is_null:
            continue
        if not trusted or "://" in node.origin:
            notices.append(f"imports {node.text} ({node.origin}) is not imported: not trusted")
            continue
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(node.text)
        except Exception as error:  # whatever the module raises is the reason to show
            rule = f"cannot be imported: {type(error).__name__}: {error}"
            problems.append(Problem(f"imports.{index}", rule, "", node.text, node.origin))
