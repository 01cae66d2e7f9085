"""What two checkpoints do not have in common, and what several have on average."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ostro.checkpoint.metadata import read_settings
from ostro.checkpoint.pieces import Stored
from ostro.checkpoint.saved import Saved
from ostro.checkpoint.single_file import SavedFile
from ostro.checkpoint.store import State
from ostro.config import leaves
from ostro.core.errors import CheckpointError


@dataclass(frozen=True)
class Difference:
    """One thing that two checkpoints do not have in common."""

    kind: str  # `setting`, `value`, or the group of a tensor
    name: str
    what: str  # both values, or how far a tensor is from the other

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.what}"


def differences(first: Saved | SavedFile, second: Saved | SavedFile) -> Iterator[Difference]:
    """Each setting, value and tensor that differs in a bit. Reads one tensor at a time."""
    configs = [_settings(saved) for saved in (first, second)]
    for kind, pair in (("setting", configs), ("value", [first.values, second.values])):
        old, new = (dict(leaves(tree)) for tree in pair)
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key) or (key in old) != (key in new):
                before, after = (str(tree.get(key, "absent")) for tree in (old, new))
                yield Difference(kind, key, f"{before} -> {after}")
    for group in sorted({*first.groups, *second.groups}):
        old, new = (
            saved.stored(group) if group in saved.groups else {} for saved in (first, second)
        )
        for name in sorted({*old, *new}):
            if fault := _tensor_difference(old.get(name), new.get(name)):
                yield Difference(group, name, fault)


def _settings(saved: Saved | SavedFile) -> dict[str, Any]:
    text = saved.texts.get("config.yaml")
    return {} if text is None else read_settings(text, str(saved))


def _tensor_difference(first: Stored | None, second: Stored | None) -> str | None:
    if first is None or second is None:
        return "only in the second" if first is None else "only in the first"
    a, b = first.full(), second.full()
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        kinds = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (a, b)]
        return " -> ".join(kinds)
    if torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b))):  # a NaN equals itself
        return None
    difference = (a.double() - b.double()).flatten()
    norms = [float(t.double().norm()) for t in (difference, a, b)]
    largest = float(difference.abs().max())
    return "max |difference| {:.3g}, its norm {:.3g}, norms {:.6g} -> {:.6g}".format(
        largest, *norms
    )


def average(checkpoints: Sequence[Saved | SavedFile]) -> State:
    """The state of the newest checkpoint, but with the mean of the weights of all.

    Sums are float64, one tensor at a time. What a backend keeps in files of its own is left out.
    """
    newest = max(checkpoints, key=lambda saved: saved.step)
    weights = [saved.stored("model") for saved in checkpoints]
    for saved, own in zip(checkpoints, weights, strict=True):
        for name in sorted({*own, *weights[0]}):
            shapes = [w[name].shape if name in w else None for w in (weights[0], own)]
            if shapes[0] != shapes[1]:
                both = f"{_shown(shapes[1])} here, {_shown(shapes[0])} in {checkpoints[0]}"
                raise CheckpointError(f"{saved} - {name} is {both} - give those of one model")
    groups = {group: newest.tensors(group) for group in newest.groups if group != "model"}
    groups["model"] = {name: _mean([own[name] for own in weights]) for name in weights[0]}
    values = {key: value for key, value in newest.values.items() if key != "deepspeed"}
    values["average_of"] = [str(saved) for saved in checkpoints]
    return State(groups, values, newest.texts)


def _shown(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _mean(stored: Sequence[Stored]) -> Tensor:
    total = stored[0].full().double()
    for each in stored[1:]:
        total += each.full()
    return (total / len(stored)).to(stored[0].full().dtype)
