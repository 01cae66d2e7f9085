"""Ctrl-C and SIGTERM: finish the work in hand, then leave.

While weights are being trained a signal only raises a flag, which the loops poll between
micro-batches, evaluation batches and sampled tokens, so that no update is torn. Anywhere else it
raises `Interrupted` at once. A second signal ends the process on the spot. Where the main thread
cannot heed a signal, a thread of this module leaves in its place.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ostro.core.errors import OstroError
from ostro.runtime.phase import current_phase

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 8.0  # seconds in which the main thread heeds a signal, if it does at all
_LOOK = 0.5  # seconds between two looks at whether it does


class Interrupted(KeyboardInterrupt):
    """The user, or the cluster, asked the run to stop."""

    go_on = "the same command resumes from what was built"
    """What to type next; a run that has begun to train names its own command."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

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
        self._may_raise: Callable[[], bool] | None = None  # None: anywhere
        self._leave: Callable[[], None] | None = None
        self._is_stuck: Callable[[], bool] = lambda: False
        self.compilation = threading.RLock()
        """Held while a compilation is marked as ended, when ranks have agreed on something, before
        the state changes or is saved; and, never to be given back, by the thread that leaves."""
        self.go_on: Callable[[], str] = lambda: Interrupted.go_on
        """What to type after a signal, as things stand when it is asked."""
        self._previous: dict[int, object] = {}
        self._over = threading.Event()

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self
        for signum in _SIGNALS:
            self._previous[signum] = signal.signal(signum, self._handle)
        # Python runs handlers in the main thread, and not while that is inside of C code: waiting
        # for another rank, say. A thread is told of signals through a pipe all the same.
        come, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._insist, args=[come], name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._previous:
            return
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_pipe)
        self._over.set()
        os.close(self._pipe)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._received is not None:
            return  # `_insist` ends the process
        self._received = signum
        compiles = self._leave is not None and current_phase().name == "compile"
        if not compiles and (self._may_raise is None or self._may_raise()):
            raise Interrupted(signum)
        name = signal.Signals(signum).name
        waits = compiles and self._may_raise is not None and not self._may_raise()
        when = " once the compilation has ended" if waits else ""
        message = f"\nostro: {name} received; saving and leaving{when} (again to stop at once)"
        print(message, file=sys.stderr, flush=True)

    def _insist(self, come: int) -> None:
        """End the process at a second signal; see to it that the first is heeded."""
        num_come = 0
        while byte := os.read(come, 1):
            if byte[0] in _SIGNALS:
                num_come += 1
                if num_come > 1:
                    _end(byte[0], "stopped at once by a second signal")
                stand_in = threading.Thread(target=self._stand_in, args=[byte[0]], daemon=True)
                stand_in.start()
        os.close(come)

    def _stand_in(self, signum: int) -> None:
        """Leave in place of a main thread that does not heed the signal, or cannot."""
        begin = time.monotonic()
        while not self._over.wait(_LOOK):
            is_late = time.monotonic() - begin >= _PATIENCE
            if is_late and self._received is None and self._may_raise is None:
                _end(signum, f"stopped by {signal.Signals(signum).name}")
            self._leave_for_main(signum)

    def _leave_for_main(self, signum: int) -> None:
        """Leave from this thread where the main one cannot: what torch compiles with loses an
        exception, or aborts on it; and a collective waits for ranks that may never come.
        """
        with self.compilation:
            leave, may_raise = self._leave, self._may_raise
            if leave is None or may_raise is None:
                return
            compiles, name = current_phase().name == "compile", signal.Signals(signum).name
            if compiles and may_raise():
                why = f"stopped by {name}"
            elif not compiles and self._is_stuck():
                why = f"stopped by {name}, while this rank waited for others"
            else:
                return
            try:
                leave()
            except OstroError as error:
                print(f"\nostro: error: {error}", file=sys.stderr, flush=True)
            except Exception:
                traceback.print_exc()
            finally:
                _end(signum, f"{why}; {self.go_on()}".removesuffix("; "))

    @property
    def received(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    @property
    def signum(self) -> int:
        """The signal that has come, or that another process must have got."""
        return signal.SIGTERM if self._received is None else self._received

    @contextmanager
    def deferred(
        self,
        unless: Callable[[], bool],
        leave: Callable[[], None] | None = None,
        is_stuck: Callable[[], bool] = lambda: False,
    ) -> Iterator[None]:
        """Inside, a signal is only noted as `received`, unless that says that it may raise.

        In a compilation nothing is raised: `leave` is called there, in a thread, and the process
        ends. So it is where the main thread `is_stuck`, which is asked twice a second.
        """
        self._may_raise, self._leave, self._is_stuck = unless, leave, is_stuck
        try:
            yield
        finally:
            self._may_raise = self._leave = None


def _end(signum: int, why: str) -> NoReturn:
    print(f"\nostro: {why}", file=sys.stderr, flush=True)
    os._exit(128 + signum)
