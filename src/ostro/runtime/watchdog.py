"""A run that hangs: noticed by a thread of each rank, written down, and ended.

The ranks count together, in the store they met in, while any of them begins a phase. Where that
count stands still for `trainer.hang_timeout`, every rank writes the Python stacks of its threads
and its last collective to `hang-rank<r>.txt`, and the lowest rank that still answers names the one
that the others wait for.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace_json

from ostro.distributed.rendezvous import Rendezvous
from ostro.runtime.phase import current_phase, listening

log = logging.getLogger("ostro")

_STDERR = 2


@dataclass(frozen=True)
class Report:
    """Where one rank is when the run hangs."""

    rank: int
    host: str
    phase: str
    step: int
    line: str  # the innermost line, outside of torch, of the thread that the rank waits for
    num_collectives: int  # collectives it has begun
    collective: str  # what the last of them sends: name and shape
    is_finished: bool
    times: int  # how often it has sent the like lately

    def __str__(self) -> str:
        where = f"rank {self.rank} ({self.host}): {self.phase} of step {self.step}, {self.line}"
        state = "finished" if self.is_finished else "waits for the others"
        return f"{where}; collective {self.num_collectives}, {self.collective}: {state}"


def find_odd(reports: Sequence[Report], num_ranks: int) -> tuple[list[int], str]:
    """The ranks that the others wait for, and what sets them apart; none where nothing does."""
    silent = sorted(set(range(num_ranks)) - {report.rank for report in reports})
    if silent:
        return silent, "no answer: gone, or in C code; its error output may hold its stacks"
    waits = [report.rank for report in reports if report.phase == "data"]
    if waits and any(report.phase == "ready" for report in reports):
        return waits, "it waits for its batch, which the others have"
    fewest = min(report.num_collectives for report in reports)
    behind = [report.rank for report in reports if report.num_collectives == fewest]
    if len(behind) < len(reports):
        return behind, "it has not come to the collective that the others wait in"
    # All are in a collective, but not in the same: the one that few are in, or that is new.
    users = Counter(report.collective for report in reports)
    rarity = {r.rank: (users[r.collective], r.times) for r in reports}
    odd = [rank for rank in rarity if rarity[rank] == min(rarity.values())]
    if len(odd) < len(reports):
        return odd, "it is in another collective than the others"
    return [], "all wait in the same collective: the network, or a device"


@contextlib.contextmanager
def watching(
    timeout: timedelta | None, folder: Path, rendezvous: Rendezvous | None = None
) -> Iterator[None]:
    """End this process, with a report in `folder`, when the run begins no phase for so long.

    `rendezvous` is where the ranks have met, if there are several; all of them enter together.
    """
    if timeout is None:
        yield
        return
    watchdog = _Watchdog(timeout.total_seconds(), folder, rendezvous)
    with listening(watchdog.hear):
        watchdog.rearm()
        watchdog.start()
        try:
            yield
        finally:
            watchdog.over.set()
            watchdog.join()


class _Watchdog(threading.Thread):
    def __init__(self, timeout: float, folder: Path, rendezvous: Rendezvous | None):
        super().__init__(name="watchdog", daemon=True)
        self.over = threading.Event()
        self._timeout, self._folder = timeout, folder
        self._interval = min(5.0, timeout / 8)
        self._num_marks = self._num_told = 0
        self._num_ranks = 1 if rendezvous is None else rendezvous.rank_info.num_ranks
        self._rank = 0 if rendezvous is None else rendezvous.rank_info.rank or 0
        # A connection of its own: the main thread may be waiting in the other.
        self._store = None if rendezvous is None else rendezvous.open_store("watchdog")

    def hear(self, phase: str) -> None:
        """A thread of this process has begun a phase."""
        self._num_marks += 1

    def run(self) -> None:
        seen, since = -1, time.monotonic()
        while not self.over.wait(self._interval):
            self.rearm()
            count = self._count()
            if count != seen:
                seen, since = count, time.monotonic()
            elif time.monotonic() - since >= self._timeout:
                self._end()
        faulthandler.cancel_dump_traceback_later()

    def rearm(self, seconds: float | None = None) -> None:
        """Let faulthandler end the process later: C code may keep this thread from running."""
        # The others are given time to name this rank before.
        late = self._timeout + 4 * self._interval if seconds is None else seconds
        faulthandler.dump_traceback_later(late, exit=True, file=_STDERR)

    def _count(self) -> int:
        """A number that grows while any rank begins phases."""
        is_alive, self._num_told = self._num_marks > self._num_told, self._num_marks
        with contextlib.suppress(dist.DistError):
            if self._store is not None:
                return self._store.add("progress", int(is_alive))
        self._store = None  # its keeper is gone: this rank is on its own
        return self._num_marks

    def _end(self) -> None:
        self.rearm(60)  # what follows may hang too
        mine = _report(self._rank)
        reports = [mine] if self._store is None else self._exchange(mine)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / f"hang-rank{self._rank}.txt", "w") as file:
                file.write(f"{time.strftime('%F %T')} {mine}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        if self._rank == min(report.rank for report in reports):
            log.error("%s", self._verdict(reports))
        self._leave_last(len(reports))
        sys.stdout.flush()
        os._exit(1)

    def _exchange(self, mine: Report) -> list[Report]:
        """The reports of the ranks that answer."""
        assert self._store is not None, "there are others"
        keys = [f"report/{rank}" for rank in range(self._num_ranks)]
        deadline = time.monotonic() + 2 * self._interval + 2
        with contextlib.suppress(dist.DistError):
            self._store.set(keys[self._rank], json.dumps(asdict(mine)))
            while not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.1)
            there = [key for key in keys if self._store.check([key])]
            return [Report(**json.loads(text)) for text in self._store.multi_get(there)]
        return [mine]

    def _leave_last(self, num_ranks: int) -> None:
        """Wait until the others have the reports and have written theirs: one keeps the store."""
        deadline = time.monotonic() + 5
        with contextlib.suppress(dist.DistError):
            if self._store is not None:
                self._store.add("written", 1)
                while self._store.add("written", 0) < num_ranks and time.monotonic() < deadline:
                    time.sleep(0.1)

    def _verdict(self, reports: list[Report]) -> str:
        odd, why = find_odd(reports, self._num_ranks)
        if self._num_ranks == 1:
            who, listed = "the run hangs", reports
        elif odd:
            names = ", ".join(map(str, odd[:8])) + (", ..." if odd[8:] else "")
            who = f"the run hangs, for rank {names} ({why})"
            listed = sorted(reports, key=lambda report: report.rank not in odd)
        else:
            who, listed = f"the run hangs ({why})", reports
        rule = f"nothing was begun for trainer.hang_timeout = {self._timeout:g} s"
        advice = (
            f"stacks are in {self._folder}/hang-rank*.txt; the run goes on from its newest"
            " checkpoint when started again; raise the timeout if something only took long"
        )
        return "\n  ".join([f"{who} - {rule} - {advice}", *map(str, listed[:8])])


def unfinished_collective() -> str | None:
    """The collective in which this rank waits for others, if it does: its number, and what it is.

    FSDP starts one before another has finished. Then this is the last one, which need not be the
    one that the rank waits for; it is the same on ranks that wait for each other.
    """
    sent = _collectives()
    if all(entry["retired"] for entry in sent):
        return None
    return f"{_number(sent)}, {_kind(sent[-1])}"


def _collectives() -> list[dict]:
    trace = json.loads(_dump_fr_trace_json(includeCollectives=True, onlyActive=False))
    # Checkpoints are written by a thread of their own, which goes its own pace on every rank.
    return [e for e in trace.get("entries", []) if e["process_group"][1] != "checkpoint"]


def _number(sent: Sequence[dict]) -> int:
    last = {entry["pg_id"]: entry["collective_seq_id"] for entry in sent}  # of each group
    return sum(last.values())


def _report(rank: int) -> Report:
    at = current_phase()
    sent = _collectives()
    last = sent[-1] if sent else None
    return Report(
        rank,
        socket.gethostname(),
        at.name,
        at.step,
        _innermost_line("loader" if at.name == "data" else "MainThread"),
        _number(sent),
        "none" if last is None else _kind(last),
        last is None or last["retired"],
        sum(_kind(entry) == _kind(last) for entry in sent if last),
    )


def _kind(entry: dict) -> str:
    return f"{entry['profiling_name']} of {entry['input_sizes']} in {entry['process_group'][1]}"


def _innermost_line(thread_name: str) -> str:
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name == thread_name and thread.ident in frames:
            stack = traceback.extract_stack(frames[thread.ident])
            last = next((f for f in reversed(stack) if "/torch/" not in f.filename), stack[-1])
            return f"{last.filename}:{last.lineno} in {last.name}"
    return "no such thread"
