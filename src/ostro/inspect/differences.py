"""What differs between two states or two histories of a run, told by the part it belongs to."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ostro.checkpoint import Saved, differences

_GROUPS = {"model": "weights", "optimizer": "optimizer", "setting": "configuration"}
_STATES = {
    "random.": "random state",
    "skip_step.": "skip-step window",
    "loss_scaler.": "loss scaler",
}
_VALUES = {"step": "step and data position", "data": "data"}
_OWN = {
    "setting": ("trainer.id", "trainer.log_dir", "trainer.checkpointer", "trainer.distributed"),
    "value": ("run_id", "made_by", "tracker"),
}
"""What belongs to an attempt."""
_CHANGING = ("throughput/", "eval/total_time", "event")


def of_checkpoints(was: Saved, now: Saved, tolerance: float = 0.0) -> Iterator[str]:
    """Whatever differs in a bit: settings, position, numbers, every tensor; first the part of the
    run that it belongs to. With a tolerance see below."""
    if tolerance:
        yield from _nearly(was, now, tolerance)
        return
    for found in differences(was, now):
        own = _OWN.get(found.kind, ())
        if not any(f"{found.name}.".startswith(f"{name}.") for name in own):
            yield f"{_part(found.kind, found.name)}: {found.name}: {found.what}"


def _nearly(was: Saved, now: Saved, tolerance: float) -> Iterator[str]:
    """The same between other numbers of ranks: all weights together, and all tensors of the
    optimizer, may differ by that share of their norm; the random state depends on the ranks."""
    if was.step != now.step:
        yield f"{_VALUES['step']}: step: {was.step} -> {now.step}"
    for group in was.groups:
        first, second = was.tensors(group), now.tensors(group)
        names = [name for name in first if _part(group, name) != "random state"]
        size = math.hypot(*(float(first[name].double().norm()) for name in names))
        far = math.hypot(*(float((first[n].double() - second[n].double()).norm()) for n in names))
        if far > tolerance * size:
            relative = far / size if size else math.inf
            yield f"{_part(group, '')}: all of it differs by {relative:.1e} of its norm"


def _part(kind: str, name: str) -> str:
    for prefix, part in _STATES.items():
        if kind == "state" and name.startswith(prefix):
            return part
    return _VALUES.get(name, "state") if kind == "value" else _GROUPS.get(kind, kind)


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
) -> Iterator[str]:
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
            yield f"{part}: {key} of step {step} was {before}, is {after}"
