"""What a tracker is, and several as one. Write your own by registering a `TrackerConfig`."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ostro.config import Choice
from ostro.core.redaction import with_secrets
from ostro.core.units import in_run_folder

logger = logging.getLogger(__name__)


def run_folder(pattern: str, run_id: str) -> Path:
    """The run's own folder: `${run_id}` in the pattern is replaced; without one, it is appended,
    unless the pattern ends with `/.`."""
    return Path(with_secrets(in_run_folder(pattern, run_id))).expanduser()


@dataclass(frozen=True)
class RunInfo:
    """What trackers know about the run."""

    id: str
    log_dir: str = "logs"
    """As configured; see `folder`."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration, of plain values."""
    resume: bool = False
    """True if the run goes on from a checkpoint."""
    num_steps: int | None = None
    """Number of updates of the whole run."""
    start_step: int = 0
    """The first step that will be logged; above 0 in a resumed run."""

    @property
    def folder(self) -> Path:
        """Where the run's logs lie."""
        return run_folder(self.log_dir, self.id)


class Tracker(ABC):
    """Receives the figures of a run. Only `log` must be written; the rest may be ignored.

    Step k is the 0-based index of an update. Methods are called by one process, in the order of
    steps, several times for the same step; values that are not finite are passed on as they are.
    """

    name: ClassVar[str] = ""
    """What messages and checkpoints call it; empty = the class name."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Figures of a step, such as `train/loss`."""

    def log_summary(self, values: Mapping[str, Any]) -> None:  # noqa: B027
        """Facts about the whole run, such as `parameter_count`."""

    def log_text(self, name: str, text: str, step: int) -> None:  # noqa: B027
        """Text of a step, such as a sample."""

    def log_event(self, event: str, values: Mapping[str, Any], step: int) -> None:  # noqa: B027
        """Something that happened at a step, such as a `rollback`."""

    def finish(self) -> None:  # noqa: B027
        """The run is over, well or not: write what is left. Called once."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint should know of the tracker, as JSON values."""
        return {}


class TrackerConfig(Choice, ABC):
    """Where the figures of a run go; `type: wandb` if none is named."""

    default_type: ClassVar[str | None] = "wandb"

    @abstractmethod
    def build(self, run: RunInfo) -> Tracker:
        """Start tracking. Raises whatever the service raises."""


class CompositeTracker(Tracker):
    """Hands everything to several trackers. One that fails is named in one warning; the others
    and the run go on, and the failing one is still tried, for it may recover.
    """

    name = "composite"

    def __init__(self, trackers: Sequence[Tracker]):
        self.trackers = list(trackers)
        self._failures: Counter[str] = Counter()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, step))

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log_summary(values))

    def log_text(self, name: str, text: str, step: int) -> None:
        self._each(lambda tracker: tracker.log_text(name, text, step))

    def log_event(self, event: str, values: Mapping[str, Any], step: int) -> None:
        self._each(lambda tracker: tracker.log_event(event, values, step))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())
        for name, count in self._failures.items():
            if count > 1:
                logger.warning("tracker %s failed %d times", name, count)

    def state(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        self._each(lambda tracker: states.update({_name(tracker): tracker.state()}))
        return {name: state for name, state in states.items() if state}

    def _each(self, act: Callable[[Tracker], object]) -> None:
        for tracker in self.trackers:
            try:
                act(tracker)
            except Exception as error:
                name = _name(tracker)
                self._failures[name] += 1
                if self._failures[name] == 1:
                    _warn(name, error)


@TrackerConfig.register_subclass("noop")
@dataclass(frozen=True)
class NoopConfig(TrackerConfig):
    """No tracking."""

    def build(self, run: RunInfo) -> Tracker:
        return CompositeTracker([])


def build_trackers(
    configs: TrackerConfig | Sequence[TrackerConfig], run: RunInfo
) -> CompositeTracker:
    """Start every tracker; one that cannot start is left out with a warning."""
    trackers = []
    for config in [configs] if isinstance(configs, TrackerConfig) else configs:
        try:
            trackers.append(config.build(run))
        except Exception as error:
            names = {kind: name for name, kind in TrackerConfig.get_known_choices().items()}
            _warn(names.get(type(config), type(config).__name__), error)
    return CompositeTracker(trackers)


def _name(tracker: Tracker) -> str:
    return tracker.name or type(tracker).__name__


def _warn(name: str, error: Exception) -> None:
    kind = type(error).__name__
    logger.warning("tracker %s failed (%s: %s); the run goes on", name, kind, error)
    logger.debug("tracker %s failed", name, exc_info=error)
