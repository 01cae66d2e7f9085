"""Other spellings of settings: a table of rows, applied inside one layer before layers merge."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ostro.config.nodes import Bad, Entry, Mapping, Node, Scalar, from_plain, join, leaves
from ostro.config.nodes import Sequence as SequenceNode
from ostro.errors import Problem


@dataclass(frozen=True)
class Alias:
    """One row: `old` is another name for `new`. Whatever lies below `old` moves with it."""

    old: str
    """Dotted path of the other spelling."""
    new: str
    """Dotted path of the setting. Elements of a list on the way are all searched."""
    convert: Callable[[str], Any] | None = None
    """From the text of a scalar to the new value; a `ValueError` names the rule."""
    note: str | None = None
    """What the notice says besides the two names."""
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


def resolve_aliases(
    layer: Mapping, aliases: Sequence[Alias], notices: list[str], problems: list[Problem]
) -> None:
    """Rewrite one layer in place until no old name is left in it."""
    for _ in aliases:
        moved = [_apply(layer, alias, notices, problems) for alias in aliases]
        if not any(moved):
            break


def _apply(layer: Mapping, alias: Alias, notices: list[str], problems: list[Problem]) -> bool:
    old, new = alias.old.split("."), alias.new.split(".")
    shared = 0
    while shared < min(len(old), len(new)) - 1 and old[shared] == new[shared]:
        shared += 1
    moved = False
    for container in list(_containers(layer, old[:shared])):
        node = _pop(container, old[shared:])
        if node is None:
            continue
        moved = True
        notice = f"{alias.old} ({node.origin}) is read as {alias.new}"
        notice += f": {alias.note}" if alias.note else ""
        if notice not in notices:
            notices.append(notice)
        node = _converted(node, alias, problems)
        if alias.entry_type is not None and isinstance(node, Scalar) and node.is_null:
            continue
        if alias.entry_type is not None and isinstance(node, Mapping):
            node = Entry(alias.entry_type, node)
        _put(container, new[shared:], node, alias, problems)
    return moved


def _containers(node: Node, parts: list[str]) -> Iterator[Mapping]:
    """Every mapping at a dotted path, through the elements of lists."""
    if isinstance(node, SequenceNode):
        for item in node.items:
            yield from _containers(item, parts)
    elif isinstance(node, Entry):
        for inner in (node.body, *node.base):
            yield from _containers(inner, parts)
    elif isinstance(node, Mapping):
        if not parts:
            yield node
        elif parts[0] in node.items:
            yield from _containers(node.items[parts[0]], parts[1:])


def _pop(container: Mapping, parts: list[str]) -> Node | None:
    child = container.items.get(parts[0])
    if len(parts) == 1 or child is None:
        return container.items.pop(parts[0], None)
    if not isinstance(child, Mapping):
        return None
    found = _pop(child, parts[1:])
    if found is not None and not child.items:
        del container.items[parts[0]]
    return found


def _converted(node: Node, alias: Alias, problems: list[Problem]) -> Node:
    if alias.convert is None or not isinstance(node, Scalar) or node.is_null:
        return node
    try:
        value = alias.convert(node.text)
    except ValueError as error:
        problems.append(Problem(alias.old, str(error), "", node.text, node.origin))
        return Bad(node.origin)
    if isinstance(value, str):
        return Scalar(value, node.origin, node.quoted)
    return from_plain(value, node.origin)


def _put(
    container: Mapping, parts: list[str], node: Node, alias: Alias, problems: list[Problem]
) -> None:
    for part in parts[:-1]:
        inner = container.items.setdefault(part, Mapping({}, node.origin))
        if not isinstance(inner, Mapping):  # cannot go below it; its own type says so later
            return
        container = inner
    there = container.items.get(parts[-1])
    if there is None:
        container.items[parts[-1]] = node
        return
    if clash := _clash(there, node, alias):
        path, first, second = clash
        rule = f"is also set as {join(alias.new, path)} ({first.origin})"
        value = second.text if isinstance(second, Scalar) else None
        problem = Problem(join(alias.old, path), rule, "keep one of the two", value, second.origin)
        problems.append(problem)
    elif isinstance(node, Entry):
        node.base.append(there)
        container.items[parts[-1]] = node
    elif isinstance(there, Mapping) and isinstance(node, Mapping):
        _absorb(there, node)


def _absorb(there: Mapping, node: Mapping) -> None:
    for key, child in node.items.items():
        inner = there.items.setdefault(key, child)
        if inner is not child and isinstance(inner, Mapping) and isinstance(child, Mapping):
            _absorb(inner, child)


def _clash(there: Node, node: Node, alias: Alias) -> tuple[str, Node, Node] | None:
    """The first setting that both spellings give, with the two places."""
    if isinstance(node, Entry):
        items = there.items if isinstance(there, SequenceNode) else [there]
        same = [item for item in items if _type_of(item) in (None, alias.entry_type)]
        pairs = [(item, node.body) for item in same if isinstance(item, (Mapping, Entry))]
    elif isinstance(there, Mapping) and isinstance(node, Mapping):
        pairs = [(there, node)]
    else:
        return "", there, node
    for first, second in pairs:
        given = dict(leaves(first))
        for path, leaf in leaves(second):
            if path in given and path != "type":
                return path, given[path], leaf
    return None


def _type_of(node: Node) -> str | None:
    if isinstance(node, Entry):
        return node.type
    kind = node.items.get("type") if isinstance(node, Mapping) else node
    return kind.text if isinstance(kind, Scalar) else None
