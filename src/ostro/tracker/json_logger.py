"""Figures as lines of JSON in `<log_dir>/<run id>/metrics.jsonl`."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ostro.core.errors import DataError
from ostro.tracker.tracker import RunInfo, Tracker, TrackerConfig

METRICS = "metrics.jsonl"


@TrackerConfig.register_subclass("json_logger")
@dataclass(frozen=True)
class JsonLoggerConfig(TrackerConfig):
    """One JSON object per event in `<log_dir>/<run id>/metrics.jsonl`."""

    def build(self, run: RunInfo) -> Tracker:
        return JsonLogger(run.folder / METRICS, run)


class JsonLogger(Tracker):
    """Appends to the file; every line is there as soon as it is logged.

    Figures are `{"step": 7, "train/loss": 3.2, ...}`; NaN and Infinity stand as JavaScript writes
    them. All other lines have an `event`: `start` or `resume` with the first step and the
    configuration, `summary`, `text`, `rollback`, `finish`. After a `start`, `resume` or
    `rollback` at step k, earlier lines of step k and later are of a lost attempt, or of an earlier
    run of the same id.
    """

    name = "json_logger"

    def __init__(self, path: Path, run: RunInfo):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+")  # noqa: SIM115
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read() != b"\n":  # the last process was killed in the middle of a line
                self._file.write(b"\n")
        self._step = run.start_step
        self._event("resume" if run.resume else "start", run=run.id, config=run.config)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._step = step
        self._write({"step": step, **metrics})

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._event("summary", values=dict(values))

    def log_text(self, name: str, text: str, step: int) -> None:
        self._write({"step": step, "event": "text", "name": name, "text": text})

    def log_event(self, event: str, values: Mapping[str, Any], step: int) -> None:
        self._step = step
        self._event(event, **values)

    def finish(self) -> None:
        self._event("finish")
        self._file.close()

    def _event(self, event: str, **values: Any) -> None:
        self._write({"step": self._step, "event": event, **values})

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, default=_plain, ensure_ascii=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()


@dataclass
class Figures:
    """What a `metrics.jsonl` says, without the steps of lost attempts."""

    run: str | None = None
    """Id of the run that wrote the last of it."""
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Name of each figure to its value by step."""
    num_damaged: int = 0
    """Lines that are no event: half written, or of something else."""

    def _forget(self, step: int) -> None:
        """Drop the updates from `step` on. An evaluation before update `step` stands."""
        for name, by_step in self.values.items():
            first = step + name.startswith("eval/")
            self.values[name] = {k: value for k, value in by_step.items() if k < first}

    def _read(self, event: Any) -> None:
        step = event["step"]
        if not isinstance(step, int):
            raise TypeError("no step")
        kind = event.get("event")
        if kind in ("start", "resume"):
            self.run = str(event.get("run"))
        if kind == "start":  # anew, in the same file
            self.values.clear()
        elif kind in ("resume", "rollback"):
            self._forget(step)
        elif kind is None:
            for name, value in event.items():
                if isinstance(value, int | float) and name != "step":
                    self.values.setdefault(name, {})[step] = float(value)


def read_metrics(path: Path) -> Figures:
    """The figures in a file that a `JsonLogger` wrote, or writes; damaged lines are counted.

    Raises `DataError` where the file cannot be read.
    """
    figures = Figures()
    try:
        with open(path, "rb") as file:
            for line in filter(bytes.strip, file):
                try:
                    figures._read(json.loads(line))
                except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
                        ValueError):  # fmt: skip
                    figures.num_damaged += 1
    except OSError as error:
        raise DataError(f"{path} - cannot be read: {error.strerror}") from error
    return figures


def _plain(value: Any) -> Any:
    """Scalars of numpy and torch as numbers, all else as text."""
    return value.item() if hasattr(value, "item") else str(value)
