"""How layers merge, by type: lists and registries. Fields and keys merge one by one in `convert`.

The last list wins; a mapping of positions (`--trainer.keep.1.until 9`) goes to its elements. A
layer that changes a registry's `type` drops what lower layers and the default say of the choice.
"""

from collections.abc import Sequence as Seq
from dataclasses import MISSING, dataclass, field
from typing import Any

from ostro.config.fields import choice_name
from ostro.config.nodes import Bad, Entry, Mapping, Node, Scalar, Sequence, explode, from_plain


@dataclass
class Stack:
    """What the layers say about one value, lowest first, above its default."""

    layers: Seq[Node]
    default: Any = field(default_factory=lambda: MISSING)

    def above(self, layer: Node) -> "Stack":
        """This stack with one more layer."""
        return Stack([*self.layers, layer], self.default)


@dataclass
class Settled:
    """A registry's stack after its `type` is settled."""

    name: str | None
    """The type in force; None where none is stated and there is no default."""
    layers: list[Mapping]
    """The layers that speak of that type."""
    default: Any
    """The default instance to start from, or MISSING."""
    dropped: list[Mapping]
    """The layers that speak of another type."""
    error: tuple[str, str] | None = None
    """Text and rule of a bare word that the registry refused."""


def items_of(node: Node) -> dict[str, Node]:
    """The keys of a mapping; none for anything else."""
    mapping = node.mapping if isinstance(node, Entry) else node
    return mapping.items if isinstance(mapping, Mapping) else {}


def settle(registry: Any, stack: Stack) -> Settled:
    """Which `type` holds after all layers, and what still counts for it."""
    choice = Settled(registry.default_choice_name(), [], stack.default, [])
    if type(stack.default) in registry.get_known_choices().values():
        choice.name = choice_name(type(stack.default))
    for layer in (part for node in stack.layers for part in explode(node)):
        if isinstance(layer, Scalar):
            try:
                read = getattr(registry, "from_scalar", lambda text: {"type": text})
                layer = from_plain(read(layer.text), layer.origin)
            except ValueError as error:
                choice.error = (layer.text, str(error))
        layer = layer.mapping if isinstance(layer, Entry) else layer
        if not isinstance(layer, Mapping):
            continue
        given = layer.items.get("type")
        if isinstance(given, Scalar):
            if choice.name is not None and given.text != choice.name:
                choice.dropped += choice.layers
                choice.layers, choice.default = [], MISSING
            choice.name = given.text
        choice.layers.append(layer)
    return choice


def fold(stack: Stack, registry: Any) -> list[Stack] | Stack:
    """The elements of a list, or one value where the type allows that too."""
    state: list[Stack] | Stack = stack
    if isinstance(stack.default, (list, tuple)):
        state = [Stack([], value) for value in stack.default]
    else:
        state = Stack([], stack.default)
    for layer in stack.layers:
        if isinstance(layer, Sequence):
            state = [Stack([item]) for item in layer.items]
        elif isinstance(layer, Entry) and registry is not None:
            state = _fold_entry(layer, registry, state)
        elif isinstance(state, Stack):
            state = state.above(layer)
        elif (indices := _indices(layer, len(state))) is not None:
            for index, node in zip(indices, items_of(layer).values(), strict=True):
                below = state[index] if index < len(state) else Stack([])
                state[index : index + 1] = [below.above(node)]
        else:
            state = Stack([layer])
    return state


def _fold_entry(entry: Entry, registry: Any, state: list[Stack] | Stack) -> list[Stack] | Stack:
    """Add the settings to the element of their type; a new one joins the others."""
    stacks = state if isinstance(state, list) else [state]
    for index, stack in enumerate(stacks):
        if settle(registry, stack).name == entry.type:
            changed = [*stacks[:index], stack.above(entry), *stacks[index + 1 :]]
            return changed if isinstance(state, list) else changed[0]
    if isinstance(state, Stack) and not state.layers and state.default in (MISSING, None):
        return Stack([entry])
    return [*stacks, Stack([entry])]


def _indices(node: Node, length: int) -> list[int] | None:
    """The positions that a mapping such as `{0: ...}` names in a list, if all do."""
    keys = items_of(node)
    if not keys or not all(key.isdecimal() and len(key) < 6 for key in keys):
        return None
    indices = [int(key) for key in keys]
    # one more than there are is a new element, each new one behind the last
    return indices if all(index <= length + i for i, index in enumerate(indices)) else None


def is_bad(layers: Seq[Node]) -> bool:
    """True when a mistake in one of the layers was reported already."""
    return any(isinstance(layer, Bad) for layer in layers)
