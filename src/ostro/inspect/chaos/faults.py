"""The faults of a campaign: what strikes, in which phase, when. The plan is pure; `Strike` acts."""

import errno
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ostro.inspect.children import sleep_on, strike
from ostro.runtime.phase import current_phase

KILLED_IN = ("data", "forward", "backward", "update", "evaluation", "save", "commit")
"""Phases of a run in which a forked process is killed and asked to stop."""
FRESH = ("import", "compile")
"""Phases that only a process of its own goes through."""
DAMAGES = ("truncated file", "flipped bit")
"""What befalls the newest checkpoint of a run that was killed."""
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM}


@dataclass(frozen=True)
class Fault:
    """One fault, injected into one run."""

    kind: str  # as the table names it
    where: str  # the phase in which it strikes, or the policy that it meets
    nth: int  # it strikes at the nth time that the phase begins, from 1
    seed: int  # of whatever else is random in it

    @property
    def draw(self) -> random.Random:
        """Random numbers of this fault."""
        return random.Random(f"{self.kind}/{self.where}/{self.nth}/{self.seed}")


def plan(
    kinds: Mapping[str, Sequence[str]],
    count_of: Callable[[str, str], int],
    num_each: int,
    seed: int,
) -> list[Fault]:
    """`num_each` faults for every place of every kind, spread over the times a phase begins.

    `kinds`: kind to its places; `count_of(kind, place)`: how often that phase begins in a run.
    """
    faults = []
    for kind, places in kinds.items():
        for where in places:
            count = count_of(kind, where)
            draw = random.Random(f"{seed}/{kind}/{where}")
            first = 2 * count // 3 if kind in DAMAGES else 1  # when there are two checkpoints
            times = [draw.randint(first, count) for _ in range(num_each)]
            faults += [Fault(kind, where, n, draw.randrange(2**31)) for n in times]
    return faults


class Counted:
    """A listener that counts how often each phase begins."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, phase: str) -> None:
        self.counts[phase] += 1


class Strike:
    """A listener that lets a fault happen when its phase begins for the nth time."""

    def __init__(self, fault: Fault, checkpoints: Path):
        self._fault, self._checkpoints = fault, checkpoints
        self._count = 0
        self._is_late = fault.where == "compile" and fault.seed % 2 == 1
        """Not as it begins but within the first compilation, which takes the longest."""
        self._waits = False

    def __call__(self, phase: str) -> None:
        fault = self._fault
        watched = "save" if fault.kind == "full disk" else fault.where
        if phase != watched:
            return
        self._count += 1
        if fault.kind == "full disk":
            self._fill()
        elif self._count == (1 if self._is_late else fault.nth) or self._waits:
            self._act()

    def _act(self) -> None:
        fault = self._fault
        what = f"{fault.kind} in {fault.where} number {fault.nth}; {self._complete()}"
        if self._is_late and not self._waits:
            threading.Timer(fault.draw.uniform(0, 0.3), self._strike_compiling).start()
        elif fault.kind in SIGNALS:
            strike(SIGNALS[fault.kind], what)
        elif fault.kind == "dead rank":
            strike(signal.SIGKILL, what)
        elif fault.kind == "slow rank":
            strike(0, what)
            time.sleep(fault.draw.uniform(0.5, 1.5))
        elif fault.kind == "stalled rank":
            strike(0, what)
            sleep_on()

    def _strike_compiling(self) -> None:
        """Somewhere within a compilation: this one, or where it has ended the next."""
        self._waits = True
        if current_phase().name == "compile":
            self._act()

    def _fill(self) -> None:
        """The disk is full, for this write or, for odd seeds, from now on."""
        if self._count == self._fault.nth:
            strike(0, f"full disk in save number {self._fault.nth}; {self._complete()}")
        lasts = self._fault.seed % 2
        if self._count == self._fault.nth or (lasts and self._count > self._fault.nth):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "injected")

    def _complete(self) -> str:
        """Which checkpoints were complete at that moment."""
        return f"complete: {','.join(map(str, steps_in(self._checkpoints))) or 'none'}"


def steps_in(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints that were put in place, whatever became of them since."""
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))


def damage(fault: Fault, checkpoints: Path) -> str:
    """Cut a file of the newest checkpoint short, or flip a bit of it; says which."""
    newest = checkpoints / f"step-{steps_in(checkpoints)[-1]}"
    draw = fault.draw
    path = draw.choice(sorted(file for file in newest.iterdir() if file.stat().st_size))
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    if fault.kind == "truncated file":
        data = data[:at]
    else:
        data[at] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"{fault.kind}: {path} at byte {at}"


IMPORT_FAULT = """
import os, sys
class Counted:
    count = 0
    def find_spec(self, name, path=None, target=None):
        Counted.count += 1
        if Counted.count == {nth}:
            os.write(2, f"doctor: {kind} in import number {nth}; complete: none, of {{name}}, the "
                        f"main thread in import of step 0\\n".encode())
            os.kill(os.getpid(), {signum})
sys.meta_path.insert(0, Counted())
from ostro.cli.main import main
if {nth} < 1:
    print(Counted.count)
else:
    main({argv!r})
"""
"""A program that is struck while it imports; with nth = 0 it prints how much there is to import."""
