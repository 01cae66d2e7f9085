"""Ctrl-C and SIGTERM: finish the work in hand, then leave.

While weights are being trained a signal only raises a flag, which the loops poll between
micro-batches and evaluation batches, so that no update is torn. Anywhere else it raises
`Interrupted` at once. A second signal ends the process on the spot.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The user, or the cluster, asked the run to stop."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.go_on = "the same command goes on from what was built"
        """How to go on; a run that has begun to train names its own configuration."""

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM: 128 + the signal's number, as shells report it."""
        return 128 + self.signum


class Signals:
    """Handlers of SIGINT and SIGTERM for the length of a `with` block.

    Must be entered in the main thread; elsewhere (a notebook's worker) it does nothing.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._deferred = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for signum in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[signum] = signal.signal(signum, self._handle)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._received is not None:
            print("\nostro: stopped at once by a second signal", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        self._received = signum
        if not self._deferred:
            raise Interrupted(signum)
        name = signal.Signals(signum).name
        message = f"\nostro: {name} received; saving and leaving (again to stop at once)"
        print(message, file=sys.stderr, flush=True)

    @property
    def received(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    @property
    def signum(self) -> int:
        """The signal that has come, or that another process must have got."""
        return signal.SIGTERM if self._received is None else self._received

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for the next `poll`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def poll(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)
