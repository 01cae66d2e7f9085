"""Files and flags to a resolved configuration whose leaves know their origin."""

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
from ostro.config.foreign import Foreign, ForeignSettings
from ostro.config.imports import Modules
from ostro.core.errors import ConfigError, Problem
from ostro.core.redaction import REDACTED, location_fault

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
    aliases: Sequence[Alias | Foreign] = (),
    search: Sequence[Path] = (),
    sections: Sequence[str] | None = None,
    trusted: bool = True,
    trust: bool = False,
) -> Loaded[Config]:
    """Read the files, then `layers` made elsewhere, then the flags, over the defaults of `cls`.

    `aliases`: other spellings, and settings of other programs that may stand there without effect.
    `texts` holds files that are no files, by name; with `sections`, dotted names, only these are
    read of files and layers. Raises one `ConfigError` with every mistake found. Modules named under
    `imports` are imported, but with `trusted=False` only those of flags, and never those of a file
    behind a URL or in a checkpoint, unless `trust` says so.
    """
    problems: list[Problem] = []
    notices: list[str] = []
    names = list(dotted_names(cls))
    renamed = [row for row in aliases if isinstance(row, Alias)]
    foreign = ForeignSettings([row for row in aliases if isinstance(row, Foreign)])
    known = names + alias_names(renamed, names)
    reader, resolver = Reader(problems, texts), Resolver(renamed, problems, notices)
    modules = Modules(trust, problems)
    sources = [(reader.file(name, search), trusted) for name in files]
    sources += [(layer, trusted) for layer in layers]
    sources.append((parse_flags(flags, reader, known), True))
    resolved: list[nodes.Node] = []
    for tree, is_trusted in sources:
        for layer in nodes.explode(tree):
            if not isinstance(layer, nodes.Mapping):  # a file that could not be read
                continue
            found = resolver.resolve(layer)
            is_flags = tree is sources[-1][0]
            resolved += (
                found if sections is None or is_flags else [_only(n, sections) for n in found]
            )
            if "imports" in names:
                modules.import_named(layer, is_trusted)
    is_partial = any(tree is nodes.BAD for tree, _ in sources)
    converter = Converter(problems, notices, known, is_partial, sections is None)
    converter.hint = modules.hint(is_saved=not trusted)
    converter.foreign = foreign
    config = converter.convert(cls, resolved, "")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    assert config is not nodes.BAD, "a value that cannot be converted leaves a problem"
    origins = {path: converter.origin_of(path) for path, _ in leaves(encode(config))}
    return Loaded(config, origins, notices + ([] if sections else modules.notices()))


def _only(node: nodes.Node, sections: Sequence[str]) -> nodes.Node:
    """The node without what is outside of these sections."""
    if not isinstance(node, nodes.Mapping):
        return node
    items = {}
    for key, child in node.items.items():
        below = [name.removeprefix(f"{key}.") for name in sections if name.startswith(f"{key}.")]
        if key in sections:
            items[key] = child
        elif below:
            items[key] = _only(child, below)
    return replace(node, items=items)


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
