"""Other spellings of settings: a table of rows, applied inside one layer before layers merge."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ostro.config import nodes
from ostro.config.fields import join
from ostro.core.errors import Problem


@dataclass(frozen=True)
class Alias:
    """One row: `old` is another name for `new`. Whatever lies below `old` moves with it."""

    old: str
    """Dotted path of the other spelling."""
    new: str
    """Dotted path of the setting. With the same parent, elements of a list on the way are all
    searched."""
    convert: Callable[[str], Any] | None = None
    """From the text of a scalar to the new value; a `ValueError` names the rule."""
    entry_type: str | None = None
    """Set where `new` holds one element of a registry or a list of them: the settings go to the
    element of this `type`, which joins the others if there is none yet."""


def alias_names(aliases: Sequence[Alias], known: Sequence[str]) -> list[str]:
    """The dotted names that the aliases add to the known ones."""
    names = []
    for alias in aliases:
        below = [name.removeprefix(alias.new) for name in known if name.startswith(alias.new + ".")]
        names += [alias.old, *(alias.old + rest for rest in below)]
    return names


@dataclass
class Resolver:
    """Rewrites layers so that no old name is left, collecting problems and notices."""

    aliases: Sequence[Alias]
    problems: list[Problem]
    notices: list[str]

    def resolve(self, layer: nodes.Mapping) -> list[nodes.Mapping]:
        """The layer in canonical names, as layers without a `base`."""
        moved = [self._apply(layer, alias) for alias in self.aliases]
        layers = [part for part in nodes.explode(layer) if isinstance(part, nodes.Mapping)]
        if not any(moved):
            return layers
        return [part for layer in layers for part in self.resolve(layer)]  # to another old name?

    def _apply(self, layer: nodes.Mapping, alias: Alias) -> bool:
        old, new = alias.old.split("."), alias.new.split(".")
        shared = len(old) - 1 if old[:-1] == new[:-1] else 0
        moved = False
        for container in list(_containers(layer, old[:shared])):
            node = _pop(container, old[shared:])
            if node is None:
                continue
            moved = True
            notice = f"{alias.old} ({node.origin}) is read as {alias.new}"
            if notice not in self.notices:
                self.notices.append(notice)
            node = self._converted(node, alias)
            if alias.entry_type is not None and isinstance(node, nodes.Mapping):
                kind = nodes.Scalar(alias.entry_type, node.origin, quoted=True)
                node = nodes.Mapping({"type": kind, **node.items}, node.origin, joins=True)
            elif alias.entry_type is not None and isinstance(node, nodes.Scalar) and node.is_null:
                continue
            self._put(node, nodes.mapping_at(container, new[shared:-1], node.origin), alias)
        return moved

    def _converted(self, node: nodes.Node, alias: Alias) -> nodes.Node:
        if alias.convert is None or not isinstance(node, nodes.Scalar) or node.is_null:
            return node
        try:
            return nodes.from_plain(alias.convert(node.text), node.origin)
        except ValueError as error:
            self.problems.append(Problem(alias.old, str(error), "", node.text, node.origin))
            return nodes.BAD

    def _put(self, node: nodes.Node, container: nodes.Mapping, alias: Alias) -> None:
        key = alias.new.rpartition(".")[2]
        there = container.items.get(key)
        if there is not None and (clash := _clash(there, node)) is not None:
            path, first, second = clash
            rule = f"is also set as {join(alias.new, path)} ({first.origin})"
            place, value = join(alias.old, path), nodes.written(second)
            self.problems.append(Problem(place, rule, "keep one of the two", value, second.origin))
            return
        if there is not None and isinstance(node, nodes.Mapping):
            node.base.append(there)
        container.items[key] = node


def _containers(node: nodes.Node, parts: list[str]) -> Iterator[nodes.Mapping]:
    """Every mapping at a dotted path, through the elements of lists."""
    if isinstance(node, nodes.Sequence):
        for item in node.items:
            yield from _containers(item, parts)
    elif isinstance(node, nodes.Mapping):
        if not parts:
            yield node
        elif parts[0] in node.items:
            yield from _containers(node.items[parts[0]], parts[1:])


def _pop(container: nodes.Mapping, parts: list[str]) -> nodes.Node | None:
    """Take out the node at a dotted path, and the mappings that it leaves empty."""
    child = container.items.get(parts[0])
    if len(parts) == 1:
        return container.items.pop(parts[0], None)
    if not isinstance(child, nodes.Mapping):
        return None
    found = _pop(child, parts[1:])
    if found is not None and not child.items:
        del container.items[parts[0]]
    return found


def _clash(there: nodes.Node, node: nodes.Node) -> tuple[str, nodes.Node, nodes.Node] | None:
    """The first setting that both spellings give, with the two places."""
    if not isinstance(node, nodes.Mapping):
        return "", there, node
    same = [there]
    if node.joins:
        items = there.items if isinstance(there, nodes.Sequence) else [there]
        same = [item for item in items if _may_be(item, node.items["type"])]
    elif not isinstance(there, nodes.Mapping):
        return "", there, node
    for item in same:
        given = dict(nodes.leaves(item))
        for path, leaf in nodes.leaves(node):
            if path in given and path != "type":
                return path, given[path], leaf
    return None


def _may_be(item: nodes.Node, kind: nodes.Node) -> bool:
    """Whether this element of a registry is of that type, or does not say."""
    return isinstance(item, nodes.Mapping) and nodes.written(
        item.items.get("type", kind)
    ) == nodes.written(kind)
