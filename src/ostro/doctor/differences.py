"""What differs between two states or two histories of a run, told by the part it belongs to."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostro.checkpoint import Saved, read_settings
from ostro.doctor.children import changed

_GROUPS = {"model": "weights", "optimizer": "optimizer"}
_STATES = {
    "random.": "random state",
    "skip_step.": "skip-step window",
    "loss_scaler.": "loss scaler",
}
_OWN_VALUES = {"run_id", "made_by", "tracker"}
_CHANGING = ("throughput/", "eval/total_time", "event")


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it should be."""

    part: str
    """weights, optimizer, random state, data position, configuration, ..."""
    what: str
    """Which of it, and both values."""

    def __str__(self) -> str:
        return f"{self.part}: {self.what}"


def of_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """Settings that differ, as `config.yaml` has them."""
    old, new = changed(was), changed(now)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield Difference("configuration", f"{key} was {old.get(key)}, is {new.get(key)}")


def of_checkpoints(was: Saved, now: Saved, tolerance: float = 0.0) -> Iterator[Difference]:
    """Whatever differs between two checkpoints: settings, position, numbers, every tensor.

    With a `tolerance` all weights together, and all tensors of the optimizer, may differ by that
    share of their norm, and the random state, which depends on the number of ranks, by anything.
    """
    settings = [read_settings(saved.texts["config.yaml"], str(saved)) for saved in (was, now)]
    yield from of_settings(*settings)
    yield from _of_values(was.values, now.values, tolerance)
    squares: dict[str, list[float]] = {}  # part -> those of the differences, and of the values
    for group in sorted({*was.groups, *now.groups}):
        first = was.tensors(group) if group in was.groups else {}
        second = now.tensors(group) if group in now.groups else {}
        for name in sorted({*first, *second}):
            part = _part(group, name)
            if name not in first or name not in second:
                missing = "before" if name not in first else "after"
                yield Difference(part, f"{name} is missing {missing}")
            elif not tolerance and (fault := _of_tensors(first[name], second[name])):
                yield Difference(part, f"{name} {fault}")
            elif tolerance and part != "random state":
                total = squares.setdefault(part, [0.0, 0.0])
                total[0] += float((first[name].double() - second[name].double()).square().sum())
                total[1] += float(first[name].double().square().sum())
    for part, (difference, size) in squares.items():
        if difference > tolerance**2 * size:
            relative = math.sqrt(difference / size) if size else math.inf
            yield Difference(part, f"all of it differs by {relative:.1e} of its norm")


def _part(group: str, name: str) -> str:
    for prefix, part in _STATES.items():
        if group == "state" and name.startswith(prefix):
            return part
    return _GROUPS.get(group, group)


def _of_values(
    was: Mapping[str, Any], now: Mapping[str, Any], tolerance: float
) -> Iterator[Difference]:
    for key in sorted({*was, *now} - _OWN_VALUES):
        old, new = was.get(key), now.get(key)
        both = isinstance(old, float) and isinstance(new, float)
        if old != new and not (both and abs(old - new) <= tolerance * abs(old)):
            part = {"step": "step and data position", "data": "data"}.get(key, "state")
            yield Difference(part, f"{key} was {old}, is {new}")


def _of_tensors(was: Tensor, now: Tensor) -> str:
    if was.shape != now.shape or was.dtype != now.dtype:
        return f"was {was.dtype} {tuple(was.shape)}, is {now.dtype} {tuple(now.shape)}"
    if _bits(was) == _bits(now):
        return ""
    largest = float((was.double() - now.double()).abs().max())
    return f"differs in {int((was != now).sum())} of {was.numel()} elements, by up to {largest:.1e}"


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_history(path: Path) -> dict[int, dict[str, Any]]:
    """What a run logged, by step; of a step that was made twice, what came last."""
    history: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if "train/loss" in event:
            history[event["step"]] = {k: v for k, v in event.items() if not k.startswith(_CHANGING)}
    return history


def of_histories(
    was: Mapping[int, Mapping[str, Any]],
    now: Mapping[int, Mapping[str, Any]],
    steps: range,
    tolerance: float = 0.0,
) -> Iterator[Difference]:
    """Figures of the log that differ, step by step."""
    for step in steps:
        old, new = was.get(step, {}), now.get(step, {})
        for key in sorted({*old, *new}, key=lambda key: (key != "batch", key)):
            before, after = old.get(key), new.get(key)
            if key == "batch" and None in (before, after):
                continue  # no one process saw all of it
            if before == after or (before != before and after != after):
                continue
            both = isinstance(before, float) and isinstance(after, float)
            if both and abs(before - after) <= tolerance * abs(before):
                continue
            part = {"batch": "data position", "optim/learning_rate": "schedule"}.get(key, "figures")
            yield Difference(part, f"{key} of step {step} was {before}, is {after}")
