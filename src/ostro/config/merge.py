"""How layers merge, by type: lists and registries. Fields and keys merge one by one in `convert`.

The last list wins; a mapping of positions (`--trainer.keep.1.until 9`) goes to its elements. A
layer that changes a registry's `type` drops what lower layers and the default say of the choice.
"""

from typing import Any

from ostro.config import nodes
from ostro.config.fields import element, is_record, join, members, registry_in
from ostro.config.scalars import BadValue

Stack = list[nodes.Node]
"""What the layers say about one value, lowest first."""


def settle(
    registry: Any, stack: Stack
) -> tuple[str | None, list[nodes.Mapping], list[nodes.Mapping]]:
    """Which `type` holds after all layers, the layers that speak of it, and the others."""
    name: str | None = registry.default_choice_name()
    kept: list[nodes.Mapping] = []
    dropped: list[nodes.Mapping] = []
    is_given = False
    for layer in stack:
        if isinstance(layer, nodes.Scalar):
            layer = nodes.from_plain(registry.from_scalar(layer.text), layer.origin)
        if not isinstance(layer, nodes.Mapping):
            continue
        given = layer.items.get("type")
        if isinstance(given, nodes.Scalar):
            if name is not None and given.text != name:
                dropped, kept = dropped + kept, []
            name, is_given = given.text, True
        kept.append(layer)
    if not is_given:
        name = registry.implied_type({key for layer in kept for key in layer.items}) or name
    return name, kept, dropped


def fold(tp: Any, stack: Stack, path: str) -> tuple[list[Stack] | None, Stack]:
    """The elements of list type `tp`; or None, and the layers of what is no list."""
    registry = registry_in(element(tp))
    items: list[Stack] | None = None
    rest: Stack = []
    for layer in stack:
        if isinstance(layer, nodes.Sequence):
            items = [[item] for item in layer.items]
        elif registry is not None and isinstance(layer, nodes.Mapping) and layer.joins:
            items, rest = _join(layer, registry, items, rest)
        elif items is None:
            rest = [*rest, layer]
        elif (positions := _positions(layer, len(items))) is not None:
            for index, node in positions:
                below = items[index] if index < len(items) else []
                items[index : index + 1] = [[*below, node]]
        else:
            if any(is_record(member) for member in members(element(tp))):
                _refuse_lost_keys(layer, items, path)
            items, rest = None, [layer]
    return items, rest


def _join(
    layer: nodes.Mapping, registry: Any, items: list[Stack] | None, rest: Stack
) -> tuple[list[Stack] | None, Stack]:
    """Add the settings to the element of their type; a new one joins the others."""
    stacks = [rest] if items is None else items
    for index, stack in enumerate(stacks):
        name, *_ = settle(registry, [part for node in stack for part in nodes.explode(node)])
        if name == nodes.written(layer.items["type"]):
            stacks = [*stacks[:index], [*stack, layer], *stacks[index + 1 :]]
            return (None, stacks[0]) if items is None else (stacks, [])
    return (None, [layer]) if items is None and not rest else ([*stacks, [layer]], [])


def _positions(layer: nodes.Node, length: int) -> list[tuple[int, nodes.Node]] | None:
    """The elements that a mapping such as `{0: ...}` gives, if all its keys are positions."""
    given = layer.items if isinstance(layer, nodes.Mapping) else {}
    if not given or not all(key.isdecimal() and len(key) < 6 for key in given):
        return None
    positions = [(int(key), node) for key, node in given.items()]
    # one more than there are is a new element, each new one behind the last
    fits = all(index <= length + i for i, (index, _) in enumerate(positions))
    return positions if fits else None


def _refuse_lost_keys(layer: nodes.Node, items: list[Stack], path: str) -> None:
    """`--trainer.tracker.project x` above a list in a file: whose project?"""
    keys = [key for key in getattr(layer, "items", {}) if not key.isdecimal()]
    if keys and "type" not in keys and items and not isinstance(items[0][0], nodes.Default):
        place = join(join(path, 0), keys[0])
        raise BadValue(f"is a list of {len(items)}", f"name one: {place}", layer)
