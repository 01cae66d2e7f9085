"""Figures as lines of JSON in `<log_dir>/<run id>/metrics.jsonl`."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostro.tracker.tracker import RunInfo, Tracker, TrackerConfig


@TrackerConfig.register_subclass("json_logger")
@dataclass(frozen=True)
class JsonLoggerConfig(TrackerConfig):
    """One JSON object per event in `<log_dir>/<run id>/metrics.jsonl`."""

    def build(self, run: RunInfo) -> Tracker:
        return JsonLogger(run.folder / "metrics.jsonl", run)


class JsonLogger(Tracker):
    """Appends to the file; every line is there as soon as it is logged.

    Figures are `{"step": 7, "train/loss": 3.2, ...}`; NaN and Infinity stand as JavaScript writes
    them. All other lines have an `event`: `start` or `resume` with the first step and the
    configuration, `summary`, `text`, `rollback`, `finish`. After a `resume` or `rollback` at step
    k, earlier lines of step k and later are of a lost attempt.
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


def _plain(value: Any) -> Any:
    """Scalars of numpy and torch as numbers, all else as text."""
    return value.item() if hasattr(value, "item") else str(value)
