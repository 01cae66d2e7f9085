"""The processes of a run find each other in torch's TCPStore, and say there why they fail."""

import contextlib
import os
import re
import socket
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import ClassVar

import torch.distributed as dist

from ostro.cluster import Place, find_place
from ostro.errors import ConfigError, OstroError, Problem

_POLL = 0.1  # seconds between two looks into the store
_PATIENCE = timedelta(seconds=10)  # processes that start together get here within this


class LostRankError(OstroError):
    """Another process of the run did not come, or is gone."""

    exit_code = 1


class Meeting:
    """What the processes of a run tell each other through a store that one of them keeps."""

    current: ClassVar["Meeting | None"] = None
    """The meeting this process takes part in."""

    def __init__(self, place: Place, timeout: timedelta):
        """Connect to the store, and keep it if this is rank 0 and no launcher does.

        Raises `LostRankError` when there is none within the timeout.
        """
        assert place.address is not None and place.rank is not None
        self.place = place
        self.keeps_store = place.rank == 0 and not place.has_agent
        self._store = dist.PrefixStore("ostro", _connect(place, self.keeps_store, timeout))
        self._failure, self._said = f"failure/{place.attempt}", f"said/{place.attempt}"

    def gather(self, timeout: timedelta) -> dist.Store:
        """Wait for all ranks; returns a store of their own.

        Raises `LostRankError` with the missing ones after the timeout, and at once when one of
        them has failed. A store that outlives its processes still has what those before a
        restart wrote: rank 0 names each round anew, and the others go to the one that has them.
        """
        store, place, me = self._store, self.place, uuid.uuid4().hex
        rank = place.rank or 0
        deadline = time.monotonic() + timeout.total_seconds()
        if rank == 0:
            store.set("round", me)
        while True:
            with _quiet(), self._watched():
                missing = [0]
                if store.check(["round"]):
                    name = store.get("round").decode()
                    keys = [f"{name}/{r}" for r in range(place.num_ranks)]
                    store.set(keys[rank], me)
                    if rank == 0 and store.check(keys):
                        store.set(f"{name}/all", b",".join(store.multi_get(keys)))
                    if store.check([f"{name}/all"]) and me in store.get(f"{name}/all").decode():
                        self._round = dist.PrefixStore(name, store)
                        return self._round
                    if time.monotonic() >= deadline:
                        missing = [r for r, key in enumerate(keys) if not store.check([key])]
                if not place.has_agent and store.check([self._failure]):
                    raise LostRankError(self._who_failed())
            if time.monotonic() >= deadline:
                raise LostRankError(_absence(place, missing, timeout))
            time.sleep(_POLL)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise LostRankError(self._who_failed(error)) from error

    def explain(self, error: Exception) -> Exception:
        """`error`, or where an exchange with the others broke a `LostRankError` that says whom."""
        broke = isinstance(error, dist.DistError)  # NCCL's, the store's; gloo's has no class
        if broke or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
            return LostRankError(self._who_failed(error))
        return error

    def _who_failed(self, error: Exception | None = None) -> str:
        try:
            with _quiet():
                if self._store.check([self._failure]):
                    failure = self._store.get(self._failure).decode()
                    return f"another process of the run has failed: {failure}"
        except dist.DistError:
            keeper = "the launcher" if self.place.has_agent else f"rank 0{_at(self.place, 0)}"
            return f"{keeper} is gone - its own error stands above, or in its log"
        what = re.sub(r"^\[[^\]]*\] ", "", str(error)).partition(". ")[0].partition("\n")[0]
        return (
            f"a process of the run is gone without a word ({what}) - it was killed, or ran out of"
            " memory: see the last lines of the launcher and of that host's kernel log (dmesg)"
        )

    def open_store(self, name: str) -> dist.Store:
        """A store for the ranks that were gathered, by a connection that nothing else waits in."""
        store = dist.PrefixStore(name, self._round.clone())
        store.set_timeout(_PATIENCE)
        return store

    def remember(self, name: str, value: str) -> str:
        """What the first process that asked for `name` gave, in this life of the store."""
        return self._store.compare_set(name, "", value).decode()

    def hears(self, text: str, patience: timedelta) -> bool:
        """Whether rank 0 fails with the same words, and so has printed them.

        A rank 0 that has come to the meeting does not refuse the settings: no need to wait for it.
        """
        early = Meeting.current is None and not self.place.attempt
        deadline = time.monotonic() + patience.total_seconds()
        with contextlib.suppress(dist.DistError), _quiet():
            while not (said := self._store.check([self._said])) and time.monotonic() < deadline:
                if early and self._store.check(["round"]):
                    break
                time.sleep(_POLL)
            if said and self._store.get(self._said).decode() == text:
                self._store.add("heard", 1)
                return True
        return False

    def tell(self, text: str, patience: timedelta) -> None:
        """Leave word of a failure; the keeper of the store stays until the others have it."""
        lines = text.strip().splitlines()
        summary = lines[-1 if text.startswith("Traceback") else 0].removeprefix("ostro: error: ")
        rank, deadline = self.place.rank, time.monotonic() + patience.total_seconds()
        with contextlib.suppress(dist.DistError), _quiet():
            word = f"rank {rank} ({socket.gethostname()}): {summary}"
            self._store.compare_set(self._failure, "", word)
            if rank == 0:
                self._store.set(self._said, text)
            while self.keeps_store and time.monotonic() < deadline:
                if self._store.add("heard", 0) >= self.place.num_ranks - 1:
                    break
                time.sleep(_POLL)


def remembered(name: str, value: str, environ: Mapping[str, str] = os.environ) -> str:
    """`value`, or what it was before an elastic launcher restarted this process."""
    place = find_place(environ)
    if not place.has_agent or place.address is None:
        return value
    return (Meeting.current or Meeting(place, _PATIENCE)).remember(name, value)


def last_words(text: str, is_lost: bool = False, environ: Mapping[str, str] = os.environ) -> None:
    """Print why this process ends. Of what all ranks say, only rank 0's copy is printed.

    `is_lost`: for want of another process, which is no news that others may bring too.
    """
    meeting, patience = Meeting.current, timedelta(seconds=1 if is_lost else 3)
    if meeting is None and not is_lost:
        patience = _PATIENCE
        with contextlib.suppress(OstroError):
            place = find_place(environ)
            if place.num_ranks > 1 and place.address is not None and place.rank is not None:
                meeting = Meeting(place, patience)
    rank = 0 if meeting is None else meeting.place.rank
    if meeting is not None and rank and meeting.hears(text, patience):
        return
    shown = textwrap.indent(text.rstrip(), f"[rank{rank}]: " if rank else "")
    sys.stderr.write(f"{shown}\n")  # at once, lest another process's lines come between
    sys.stderr.flush()
    if meeting is not None:
        meeting.tell(text, patience)


def _connect(place: Place, keeps_store: bool, timeout: timedelta) -> dist.Store:
    host, _, port = str(place.address).rpartition(":")
    deadline = time.monotonic() + timeout.total_seconds()
    attempt = min(timeout, timedelta(seconds=5))  # a signal is heeded only between two of them
    while True:
        try:
            with _quiet():
                store = dist.TCPStore(
                    host.strip("[]"), int(port),
                    is_master=keeps_store, timeout=attempt, wait_for_workers=False,
                )  # fmt: skip
            store.set_timeout(timeout)
            return store
        except dist.DistError as error:
            if keeps_store:
                rule = f"rank 0 cannot listen there: {str(error).splitlines()[0]}"
                advice = "take a free port of this host (MASTER_PORT)"
                setting = "trainer.distributed.coordinator_address"
                raise ConfigError(Problem(setting, rule, advice, place.address)) from error
            if time.monotonic() >= deadline:
                raise LostRankError(_absence(place, [0], timeout)) from error


def _absence(place: Place, missing: list[int], timeout: timedelta) -> str:
    listed = ", ".join(f"{rank}{_at(place, rank)}" for rank in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return (
        f"{'rank' if len(missing) == 1 else 'ranks'} {listed}{more} of {place.num_ranks} did not"
        f" come to {place.address} within trainer.distributed.timeout ="
        f" {timeout.total_seconds():g} s - see whether each was started and what it printed, and"
        " whether its host reaches that address (name, port, firewall)"
    )


def _at(place: Place, rank: int) -> str:
    return f" (on {place.hosts[rank]})" if place.hosts else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's C++ stack traces off the terminal: what fails here is said in one line."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
