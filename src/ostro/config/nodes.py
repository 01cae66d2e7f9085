"""The tree between text and dataclasses: raw text, how it was quoted, where it was written.

A layer is a `Mapping`. Nothing here knows a type: `true` is text until a field says otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

NULLS = ("", "~", "null", "Null", "NULL")


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


@dataclass
class Entry:
    """Settings for the one element of a certain `type`, alone or in a list, new or not."""

    type: str
    body: Mapping
    base: list["Node"] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return self.body.origin

    @property
    def mapping(self) -> Mapping:
        """The settings as a mapping that states its type."""
        kind = Scalar(self.type, self.origin, quoted=True)
        return Mapping({"type": kind, **self.body.items}, self.origin)


@dataclass
class Bad:
    """Stands where a mistake was already reported, so that it is not reported twice."""

    origin: str


Node = Scalar | Sequence | Mapping | Entry | Bad


def explode(node: Node) -> list[Node]:
    """The node as layers without a `base`, lowest first."""
    if isinstance(node, Entry):
        return [layer for base in node.base for layer in explode(base)] + [
            Entry(node.type, node.body)
        ]
    if not isinstance(node, Mapping):
        return [node]
    layers = [layer for base in node.base for layer in explode(base)]
    children = {key: explode(child) for key, child in node.items.items()}
    depth = max([1, *map(len, children.values())])
    for level in range(-depth, 0):
        items = {key: stack[level] for key, stack in children.items() if level >= -len(stack)}
        layers.append(Mapping(items, node.origin, raw=node.raw))
    return layers


def leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Dotted paths of everything that is not a mapping (a list is one leaf)."""
    if isinstance(node, Mapping):
        for key, child in node.items.items():
            yield from leaves(child, join(path, key))
    elif isinstance(node, Entry):
        yield from leaves(node.body, path)
    else:
        yield path, node


def join(path: str, key: str | int) -> str:
    """`a.b` and `c` as `a.b.c`."""
    return f"{path}.{key}" if path and key != "" else f"{path}{key}"


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
    if isinstance(node, Scalar):
        text = node.text if node.text or not node.quoted else '""'
    elif isinstance(node, Sequence):
        text = "[" + ", ".join(written(item) for item in node.items[:20]) + "]"
    elif isinstance(node, Mapping):
        pairs = list(node.items.items())[:20]
        text = "{" + ", ".join(f"{key}: {written(child)}" for key, child in pairs) + "}"
    else:
        text = written(node.body) if isinstance(node, Entry) else ""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
