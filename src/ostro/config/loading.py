"""Files and flags to a resolved configuration whose leaves know their origin."""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from ostro.config import nodes
from ostro.config.aliases import Alias, Resolver, alias_names
from ostro.config.convert import Converter, find_problems, text_at
from ostro.config.encode import encode
from ostro.config.fields import dotted_names, holds_location, join, settings
from ostro.config.files import Reader
from ostro.config.flags import parse_flags
from ostro.errors import ConfigError, Problem
from ostro.secrets import REDACTED, location_fault

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

    def derive(self, **values: Any) -> "Loaded[Config]":
        """A copy with these fields set; the origin of all below them is `derived`."""
        config = replace(self.config, **values)  # type: ignore[type-var]
        origins = {}
        for leaf, _ in leaves(encode(config)):
            is_derived = leaf.partition(".")[0] in values
            origins[leaf] = "derived" if is_derived else self.origins.get(leaf, "default")
        return Loaded(config, origins, self.notices)


def load(
    cls: type[Config],
    files: Sequence[str],
    flags: Sequence[str] = (),
    *,
    layers: Sequence[nodes.Mapping] = (),
    texts: Mapping[str, str] | None = None,
    aliases: Sequence[Alias] = (),
    search: Sequence[Path] = (),
    trusted: bool = True,
) -> Loaded[Config]:
    """Read the files, then `layers` made elsewhere, then the flags, over the defaults of `cls`.

    `texts` holds files that are no files, by name. Raises one `ConfigError` with every mistake
    found. With `trusted=False`, and for files
    that are URLs, modules named under `imports` are not imported, and a notice says so.
    """
    problems: list[Problem] = []
    notices: list[str] = []
    names = list(dotted_names(cls))
    known = names + alias_names(aliases, names)
    reader, resolver = Reader(problems, texts), Resolver(aliases, problems, notices)
    sources = [(reader.file(name, search), trusted) for name in files]
    sources += [(layer, trusted) for layer in layers]
    sources.append((parse_flags(flags, reader, known), True))
    resolved: list[nodes.Node] = []
    for tree, is_trusted in sources:
        for layer in nodes.explode(tree):
            if not isinstance(layer, nodes.Mapping):  # a file that could not be read
                continue
            resolved += resolver.resolve(layer)
            if "imports" in names:
                _import_modules(layer, is_trusted, notices, problems)
    is_partial = any(tree is nodes.BAD for tree, _ in sources)
    converter = Converter(problems, notices, known, is_partial)
    config = converter.convert(cls, resolved, "")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    assert config is not nodes.BAD, "a value that cannot be converted leaves a problem"
    origins = {path: converter.origin_of(path) for path, _ in leaves(encode(config))}
    return Loaded(config, origins, notices)


def check(config: Any) -> None:
    """Refuse a configuration that cannot be run: every `problems()`, what was saved without its
    credential, and environment variables that are not set, in one `ConfigError`."""
    found = [
        replace(problem, value=problem.value or text_at(config, problem.setting))
        for problem in find_problems(config)
    ]
    advice = "give the whole value as a flag, or write ${NAME} for an environment variable"
    found += [
        Problem(path, "was saved without its credential", advice, text_at(config, path))
        for path, value in leaves(encode(config))
        if REDACTED in str(value)
    ]
    found += _location_problems(config, "")
    if found:
        raise ConfigError(list(dict.fromkeys(found)))


def _location_problems(value: Any, path: str) -> Iterator[Problem]:
    """Paths and URLs in which a `${NAME}` cannot be filled in here."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            yield from _location_problems(child, join(path, key))
    if not is_dataclass(value) or isinstance(value, type):
        return
    hints = get_type_hints(type(value), include_extras=True)
    for item in settings(type(value)):
        child, name = getattr(value, item.name), join(path, item.name)
        if not holds_location(hints[item.name]):
            yield from _location_problems(child, name)
            continue
        for location in child if isinstance(child, list) else [child]:
            if isinstance(location, str) and (fault := location_fault(location)):
                yield Problem(name, *fault, location)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and leaves of an encoded value; a list of scalars is one leaf."""
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, child in value.items():
        yield from leaves(child, join(path, key))


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
