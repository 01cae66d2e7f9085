"""One hook: a function called after every update, and the rule for those due less often."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepInfo:
    """What a hook is told about the update that was just made."""

    step: int
    """0-based index of the update."""
    is_last: bool
    """True after the last update of the run: every hook fires."""


Callback = Callable[[StepInfo], None]
"""A hook. It must not wait for the device except when it has something to do."""


def is_due(num_steps: int | None, info: StepInfo) -> bool:
    """True after update k when k % num_steps == 0 (so after the first), and after the last.

    With `num_steps` null, after the last only.
    """
    return info.is_last or (num_steps is not None and info.step % num_steps == 0)
