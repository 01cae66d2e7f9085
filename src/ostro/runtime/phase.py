"""Where a process is: the phases that a run passes through, told to whoever listens.

    data  ready  forward  backward  update           the main thread, again and again: it waits
    evaluation  sample  rollback                     for a batch; has it, and waits for the others
    compile                                          within any of them
    load  stage  save  commit                        any thread: one batch read; a checkpoint's
                                                     copy made, its files written, made to count

The watchdog looks here for what stalls, and the tests of failures let them happen here.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """What the main thread was last seen to begin."""

    name: str
    step: int  # 0-based index of the update that is being made


_current = Phase("start", 0)
_listeners: list[Callable[[str], None]] = []


def current_phase() -> Phase:
    """Where the main thread is."""
    return _current


def enter_phase(phase: str, step: int | None = None) -> None:
    """This thread begins `phase`; of the main thread that is remembered, with its step."""
    global _current
    if threading.current_thread() is threading.main_thread():
        _current = Phase(phase, _current.step if step is None else step)
    for listener in _listeners:
        listener(phase)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Call `listener` with every phase that any thread begins; what it raises comes out there."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
