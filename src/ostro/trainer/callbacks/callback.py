"""What a callback is, and when the trainer calls it. Write your own by registering a
`CallbackConfig`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ostro.checkpoint import SaveReport
from ostro.config import Choice
from ostro.tracker import RunInfo

if TYPE_CHECKING:
    from ostro.trainer.trainer import Trainer


@dataclass(frozen=True)
class StepInfo:
    """The step that was just made."""

    step: int
    """Its 0-based index."""
    is_last: bool
    """Whether it is the last step of the run."""


class Callback:
    """Something to do beside the steps of a run. Override what you need.

    Every method is called on every rank, for the callbacks of the run in their order: evaluation,
    sampling, saving, snapshots, then those of `trainer.callbacks`. They may read the trainer's
    `state` (model, optimizer, step), `config`, `plan`, `schedule`, `world` and `throughput`, and
    log through its `tracker`. A callback must not change the state, and must not wait for the
    device except when it has something to do. What it raises ends the run.
    """

    def on_start(self, trainer: "Trainer") -> None:
        """The run has been restored, and the first step has not begun."""

    def before_step(self, trainer: "Trainer", step: int) -> None:
        """Step `step` begins; it is not called for steps that are skipped."""

    def after_step(self, trainer: "Trainer", info: StepInfo) -> None:
        """A step was made, or skipped; `trainer.state.step` is the next one."""

    def after_evaluation(self, trainer: "Trainer", step: int, metrics: Mapping[str, float]) -> None:
        """The model was evaluated; `metrics` are those of all ranks, as they were logged."""

    def after_save(self, trainer: "Trainer", report: SaveReport) -> None:
        """A checkpoint is complete. Called on the ranks that save: the first, or all with FSDP."""

    def on_end(self, trainer: "Trainer") -> None:
        """The run has ended: finished, interrupted or failed."""


class CallbackConfig(Choice, ABC):
    """Settings of a callback; `type` picks the class."""

    default_type: ClassVar[str | None] = None

    @abstractmethod
    def build(self, run: RunInfo) -> Callback:
        """The callback of a run."""


def is_due(num_steps: int | None, info: StepInfo) -> bool:
    """True after step k when k % num_steps == 0 (so after the first), and after the last.

    With `num_steps` null, after the last only.
    """
    return info.is_last or (num_steps is not None and info.step % num_steps == 0)
