"""The tree between text and dataclasses: raw text, how it was quoted, where it was written.

A layer is a `Mapping`. Nothing here knows a type: `true` is text until a field says otherwise.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from ostro.config.encode import encode
from ostro.config.fields import choice_name, is_text_class, join, settings

NULLS = ("", "~", "null", "Null", "NULL")


class Bad:
    """Stands for what could not be read or converted; the problem is recorded already."""

    origin = ""


BAD: Any = Bad()


@dataclass
class Scalar:
    """One value as it was written, without its quotes."""

    text: str
    origin: str
    quoted: bool = False

    @property
    def is_null(self) -> bool:
        return not self.quoted and self.text in NULLS


@dataclass
class Sequence:
    """A YAML list."""

    items: list["Node"]
    origin: str
    raw: str | None = None
    """The text of the flag that this was read from; a text field takes it as it is."""


@dataclass
class Mapping:
    """A YAML mapping. Each value's origin is the place of its key."""

    items: dict[str, "Node"]
    origin: str
    base: list["Node"] = field(default_factory=list)
    """What lies under this mapping, lowest first: `<<: !include base.yaml` puts a file there."""
    raw: str | None = None
    """As for `Sequence`."""
    joins: bool = False
    """Over a list or another type, this goes to the element of its `type`, new or not."""


@dataclass
class Default:
    """A field's default, under all layers: an object, not text."""

    value: Any
    origin: str = "default"


Node = Scalar | Sequence | Mapping | Default | Bad


def explode(node: Node) -> list[Node]:
    """The node as layers without a `base`, lowest first. A default opens by one level."""
    if isinstance(node, Default):
        return _opened(node.value)
    if not isinstance(node, Mapping):
        return [node]
    layers = [layer for base in node.base for layer in explode(base)]
    children = {
        key: [child] if isinstance(child, Default) else explode(child)
        for key, child in node.items.items()
    }
    depth = max([1, *map(len, children.values())])
    for level in range(-depth, 0):
        items = {key: stack[level] for key, stack in children.items() if level >= -len(stack)}
        if node.joins:
            items["type"] = node.items["type"]
        layers.append(Mapping(items, node.origin, raw=node.raw, joins=node.joins))
    return layers


def _opened(value: Any) -> list[Node]:
    if isinstance(value, (list, tuple)):
        return [Sequence([Default(item) for item in value], "default")]
    parts: dict[str, Node] = {str(key): Default(part) for key, part in children(value)}
    if is_dataclass(value) and (name := choice_name(type(value))):
        parts["type"] = Scalar(name, "default", quoted=True)
    # a scalar gives way to anything above it
    return [Mapping(parts, "default")] if parts else []


def children(value: Any) -> list[tuple[Any, Any]]:
    """The parts of a configuration: fields, keys or positions."""
    if is_dataclass(value) and not is_text_class(type(value)):
        return [(item.name, getattr(value, item.name)) for item in settings(type(value))]
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def mapping_at(layer: Mapping, parts: Seq[str], origin: str) -> Mapping:
    """The mapping at a path, made where there is none: `model: gpt2` lies under it then."""
    for part in parts:
        child = layer.items.get(part)
        if not isinstance(child, Mapping):
            child = Mapping({}, origin, [] if child is None else [child])
            layer.items[part] = child
        layer = child
    return layer


def leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Dotted paths of everything that is not a mapping (a list is one leaf)."""
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, child in node.items.items():
        yield from leaves(child, join(path, key))


def from_plain(value: Any, origin: str) -> Node:
    """Python values as nodes; text counts as quoted."""
    if isinstance(value, dict):
        items = {str(key): from_plain(child, origin) for key, child in value.items()}
        return Mapping(items, origin)
    if isinstance(value, (list, tuple)):
        return Sequence([from_plain(child, origin) for child in value], origin)
    if isinstance(value, str):
        return Scalar(value, origin, quoted=True)
    if value is None or isinstance(value, bool):
        return Scalar("null" if value is None else str(value).lower(), origin)
    return Scalar(repr(value), origin)


def written(node: Node, limit: int = 60) -> str:
    """The node as text for a message, in one short line."""
    text = ""
    if isinstance(node, Scalar):
        text = node.text if node.text or not node.quoted else '""'
    elif isinstance(node, Sequence):
        text = "[" + ", ".join(written(item) for item in node.items[:20]) + "]"
    elif isinstance(node, Mapping):
        pairs = list(node.items.items())[:20]
        text = "{" + ", ".join(f"{key}: {written(child)}" for key, child in pairs) + "}"
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def value_text(value: Any, limit: int = 60) -> str:
    """A value of a configuration as text for a message."""
    return written(from_plain(encode(value), "default"), limit)
