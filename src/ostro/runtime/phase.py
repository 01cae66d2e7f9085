"""The phase that a process is in. A run enters one after the other, and listeners are told.

The main thread, for every step:

    data        waits for a batch
    ready       has it, and waits for the other ranks
    forward     computes the loss of a micro-batch
    backward    computes its gradients
    update      changes the weights

In between, when due: `evaluation`, `sample` (one token), `rollback`; and within any of them
`compile`, while torch compiles something.

Any thread:

    load        reads a batch
    stage       copies the state for a checkpoint
    save        writes a part of its files
    commit      makes the checkpoint count

The watchdog finds out here what stalls, and tests make runs fail at a given phase.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """The phase that the main thread entered last."""

    name: str
    step: int  # the step that is being made, 0-based


_current = Phase("start", 0)
_listeners: list[Callable[[str], None]] = []


def current_phase() -> Phase:
    """The phase that the main thread is in."""
    return _current


def enter_phase(phase: str, step: int | None = None) -> None:
    """Enter a phase, and tell the listeners. That of the main thread is kept, with its step."""
    global _current
    if threading.current_thread() is threading.main_thread():
        _current = Phase(phase, _current.step if step is None else step)
    for listener in _listeners:
        listener(phase)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Call `listener` with every phase that any thread enters, in that thread. What it raises is
    raised there."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
