"""Figures as TensorBoard events."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ostro.core.errors import Problem
from ostro.core.redaction import Location
from ostro.tracker.tracker import RunInfo, Tracker, TrackerConfig, run_folder


@TrackerConfig.register_subclass("tensorboard")
@dataclass(frozen=True)
class TensorboardConfig(TrackerConfig):
    """TensorBoard event files; `tensorboard --logdir logs` shows them."""

    logdir: Location = "logs"
    """Folder of the event files; the run id is appended, or replaces `${run_id}`; a
    folder that ends with `/.` is taken as it is."""
    flush_secs: int = 30
    """Seconds after which events are written to the file at the latest."""

    def problems(self) -> Iterator[Problem]:
        if not self.logdir.strip():
            yield Problem("logdir", "must name a folder")

    def build(self, run: RunInfo) -> Tracker:
        return TensorboardTracker(self, run)


class TensorboardTracker(Tracker):
    """Scalars and texts. A start hides what an earlier run of the same id wrote; a resume or a
    roll-back, what a lost attempt wrote for the same steps."""

    name = "tensorboard"

    def __init__(self, config: TensorboardConfig, run: RunInfo):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(run_folder(config.logdir, run.id)),
            purge_step=run.start_step,
            flush_secs=config.flush_secs,
        )
        self._step = run.start_step
        self._log_values("config", run.config)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._log_values("summary", values)

    def log_text(self, name: str, text: str, step: int) -> None:
        # Indented text is shown as it stands, not read as markdown.
        self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)

    def log_event(self, event: str, values: Mapping[str, Any], step: int) -> None:
        if event == "rollback":
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            start = SessionLog(status=SessionLog.START)  # TensorBoard drops later steps at it
            self._writer._get_file_writer().add_event(Event(step=step, session_log=start))

    def finish(self) -> None:
        self._writer.close()

    def _log_values(self, name: str, values: Mapping[str, Any]) -> None:
        self.log_text(name, json.dumps(dict(values), indent=2, default=str), self._step)
