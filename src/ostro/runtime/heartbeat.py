"""Whether a rank hangs or is only late, told to a rank that has got a signal and waits for others.

Ranks agree to stop between micro-batches. One that is late comes to that: it compiles, saves, or
computes slowly. One that hangs never does, and the others would wait with it for ever. So once a
rank asks, a thread of every rank says in the store they met in, twice a second, where its main
thread is. A rank hangs that says nothing for some seconds; and one of them does where none moves,
though they do not all wait in the same collective.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import torch.distributed as dist

from ostro.distributed.rendezvous import Rendezvous, quiet_torch
from ostro.runtime.phase import current_phase, listening
from ostro.runtime.watchdog import unfinished_collective

_PATIENCE = 5.0  # seconds in which a rank that works is heard of, and seen to move
_LATER = 1.5  # seconds by which the other ranks leave after rank 0
_INTERVAL = 0.5  # seconds between two looks into the store
_LONG_PHASES = ("compile", "rollback", "stage", "save", "commit")  # may take any time, at rest
_BUSY = 0.1  # share of one core that a rank uses which computes


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    collective: str | None  # the one it waits in
    still: float  # seconds in which it began nothing and computed nothing
    has_left: bool = False


class _Stillness:
    """For how long the main thread has not moved. Asked by one thread only."""

    def __init__(self, is_saving: Callable[[], bool]):
        self._is_saving, self._num_marks = is_saving, 0
        self._seen: tuple[int, str | None] | None = None
        self._since = self._looked = time.monotonic()
        self._computed = 0.0

    def hear(self, phase: str) -> None:
        self._num_marks += 1

    def look(self) -> Beat:
        now, collective = time.monotonic(), unfinished_collective()
        computed = time.process_time() - time.thread_time()  # by all other threads
        share = (computed - self._computed) / max(now - self._looked, 1e-3)
        self._computed, self._looked = computed, now
        works = self._is_saving() or current_phase().name in _LONG_PHASES or share > _BUSY
        seen = self._num_marks, collective
        # Who waits in a collective may spin there, and its checkpoint be under way.
        if seen != self._seen or (collective is None and works):
            self._seen, self._since = seen, now
        return Beat(collective, now - self._since)


class Heartbeat(threading.Thread):
    """What this rank says of itself, and what it has heard of the others."""

    def __init__(self, rendezvous: Rendezvous, is_saving: Callable[[], bool]):
        super().__init__(name="heartbeat", daemon=True)
        self.over = threading.Event()
        self.num_ranks, self._rank = rendezvous.rank_info.num_ranks, rendezvous.rank_info.rank or 0
        # Where all ask at once each reads of all: with thousands of ranks not twice a second.
        self._interval = max(_INTERVAL, self.num_ranks / 256)
        # Rank 0 may have all to save: it goes first, as one that leaves breaks what others wait in.
        later = _LATER if self._rank else 0.0
        self._patience = max(_PATIENCE, 3 * self._interval) + later
        self.told, self.asked = _Stillness(is_saving), _Stillness(is_saving)
        # A connection of its own: the main thread may be waiting in the other.
        self._store = rendezvous.open_store("heartbeat")
        self._asks = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}  # the last word of each, and since when

    def run(self) -> None:
        with contextlib.suppress(dist.DistError):  # its keeper is gone: nothing more is heard
            while not self.over.wait(self._interval):
                with quiet_torch():
                    self._converse()
            with quiet_torch():
                self._say(Beat(None, 0.0, has_left=True))

    def _converse(self) -> None:
        if self._asks.is_set():
            self._store.set("asked", "")
        if self._store.check(["asked"]):
            self._say(self.told.look())
        if self._asks.is_set():
            self._hear()

    def _say(self, beat: Beat) -> None:
        self._store.set(str(self._rank), json.dumps([time.monotonic(), *astuple(beat)]))

    def _hear(self) -> None:
        missing = [rank for rank in range(self.num_ranks) if rank not in self._heard]
        there = [*self._heard, *(rank for rank in missing if self._store.check([str(rank)]))]
        words = self._store.multi_get([str(rank) for rank in there])
        for rank, word in zip(there, map(bytes.decode, words), strict=True):
            if rank not in self._heard or self._heard[rank][0] != word:
                self._heard[rank] = word, time.monotonic()

    def finds_one_hanging(self, saves_together: bool) -> bool:
        """Whether this rank waits for one that will not come; the others are asked from now on.

        `saves_together`: it is saving what needs all ranks.
        """
        mine, now = self.asked.look(), time.monotonic()
        if not self._asks.is_set():
            self._begin = now
            self._asks.set()
        waits = mine.still >= self._patience
        if not (waits or saves_together):
            return False
        beats = [mine]
        for rank in range(self.num_ranks):
            word, when = self._heard.get(rank, ("", self._begin))
            beat = Beat(*json.loads(word)[1:]) if word else Beat(None, 0.0)
            if now - when >= self._patience and not beat.has_left:
                return True
            if rank != self._rank and not beat.has_left:
                beats.append(beat)
        all_stand_still = all(beat.still >= self._patience for beat in beats)
        return all_stand_still and len({beat.collective for beat in beats}) > 1


@contextlib.contextmanager
def beating(
    rendezvous: Rendezvous | None, is_saving: Callable[[], bool]
) -> Iterator[Heartbeat | None]:
    """Answer the ranks that ask, while inside; None for a process alone. All ranks enter together.

    `is_saving`: whether a checkpoint of this rank is under way.
    """
    if rendezvous is None:
        yield None
        return
    heartbeat = Heartbeat(rendezvous, is_saving)
    with listening(heartbeat.told.hear), listening(heartbeat.asked.hear):
        heartbeat.start()
        try:
            yield heartbeat
        finally:
            heartbeat.over.set()
            heartbeat.join()
