"""The processes of a run find each other in torch's TCPStore, and say there why they fail."""

import contextlib
import ctypes
import errno
import functools
import ipaddress
import logging
import os
import re
import socket
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

from ostro.core.errors import ConfigError, OstroError, Problem
from ostro.distributed.launchers import RankInfo, find_rank_info

log = logging.getLogger("ostro")

_POLL = 0.1  # seconds between two looks into the store
_PATIENCE = timedelta(seconds=10)  # processes that start together get here within this
_SOON = 3.0  # seconds in which ranks that fail alike are heard before an error is printed
_ADDRESS = "trainer.distributed.coordinator_address"


class LostRankError(OstroError):
    """Another process of the run did not come, or is gone."""

    exit_code = 1


class Rendezvous:
    """The store in which the ranks of a run meet, and tell each other why they fail.

    Rank 0 keeps it, or the launcher does where there is one that outlives the ranks (torchrun).
    """

    current: ClassVar["Rendezvous | None"] = None
    """The one that this process has joined."""

    def __init__(self, rank_info: RankInfo, timeout: timedelta):
        """Connect to the store; rank 0 starts it where no launcher has.

        Raises `LostRankError` if it cannot be reached within the timeout.
        """
        assert rank_info.address is not None and rank_info.rank is not None
        self.rank_info = rank_info
        self.keeps_store = rank_info.rank == 0 and not rank_info.has_agent
        self._store = dist.PrefixStore("ostro", _connect(rank_info, self.keeps_store, timeout))
        self._failure, self._said = f"failure/{rank_info.attempt}", f"said/{rank_info.attempt}"

    def gather(self, timeout: timedelta) -> dist.Store:
        """Wait until all ranks are here; returns a store of this round alone.

        A launcher's store outlives the ranks: after a restart it still holds what the ranks before
        wrote. So rank 0 draws a new name for each round, and a rank has arrived once it finds
        itself in the round's list.

        Raises `LostRankError` with the missing ranks after the timeout, and at once if one fails.
        """
        store, rank_info, me = self._store, self.rank_info, uuid.uuid4().hex
        rank = rank_info.rank or 0
        deadline = time.monotonic() + timeout.total_seconds()
        if rank == 0:
            store.set("round", me)
        while True:
            with quiet_torch(), self._watched():
                missing = [0]
                if store.check(["round"]):
                    name = store.get("round").decode()
                    self._require_count(store.compare_set(f"{name}/count", "", self._count()))
                    keys = [f"{name}/{r}" for r in range(rank_info.num_ranks)]
                    store.set(keys[rank], me)
                    if rank == 0 and store.check(keys):
                        store.set(f"{name}/all", b",".join(store.multi_get(keys)))
                    if store.check([f"{name}/all"]) and me in store.get(f"{name}/all").decode():
                        self._round = dist.PrefixStore(name, store)
                        return self._round
                    if time.monotonic() >= deadline:
                        missing = [r for r, key in enumerate(keys) if not store.check([key])]
                if not rank_info.has_agent and store.check([self._failure]):
                    raise LostRankError(self._who_failed())
            if time.monotonic() >= deadline:
                raise LostRankError(_absence(rank_info, missing, timeout))
            time.sleep(_POLL)

    def _count(self) -> str:
        return f"{self.rank_info.num_ranks} {self.rank_info.rank}"

    def _require_count(self, said: bytes) -> None:
        """Refuse to wait for ranks that another rank knows nothing of."""
        count, rank = map(int, said.split())
        if count != self.rank_info.num_ranks:
            rule = f"rank {rank} was told that there are {count}"
            advice = "tell all ranks the same number (num_processes, or the launcher's)"
            value = str(self.rank_info.num_ranks)
            raise ConfigError(Problem(self.rank_info.names[1], rule, advice, value))

    def wait(
        self, store: dist.Store, keys: Mapping[int, str], timeout: timedelta, what: str
    ) -> None:
        """Return once these keys are set in a store of `open_store`, each by its rank.

        Raises `LostRankError` after the timeout, with the ranks that did not come to `what`; and
        at once when one of them has failed.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            with quiet_torch(), self._watched():
                if store.check(list(keys.values())):
                    return
                if not self.rank_info.has_agent and self._store.check([self._failure]):
                    raise LostRankError(self._who_failed())
                if time.monotonic() >= deadline:
                    missing = [rank for rank, key in keys.items() if not store.check([key])]
                    raise LostRankError(_absence(self.rank_info, missing, timeout, what))
            time.sleep(_POLL)

    def wait_for_first(self, is_over: Callable[[], bool]) -> None:
        """Wait until rank 0 calls this too, or has failed, or `is_over()`."""
        # Through the connection that exists: opening one would block if rank 0 kept the store and
        # has left.
        with contextlib.suppress(dist.DistError), quiet_torch():
            if self.rank_info.rank == 0:
                self._round.set("first", "is here")
            failed = partial(self._store.check, [self._failure])
            while not (self._round.check(["first"]) or failed() or is_over()):
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
            with quiet_torch():
                if self._store.check([self._failure]):
                    failure = self._store.get(self._failure).decode()
                    return f"another process of the run has failed: {failure}"
        except dist.DistError:
            keeper = (
                "the launcher" if self.rank_info.has_agent else f"rank 0{_at(self.rank_info, 0)}"
            )
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

    def hears(self, text: str, deadline: float) -> bool:
        """Whether rank 0 fails with the same words before `deadline`, and so has printed them.

        A rank 0 that has come to the rendezvous accepts the settings: no need to wait for it.
        """
        early = Rendezvous.current is None and not self.rank_info.attempt
        with contextlib.suppress(dist.DistError), quiet_torch():
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
        rank, deadline = self.rank_info.rank, time.monotonic() + patience.total_seconds()
        with contextlib.suppress(dist.DistError), quiet_torch():
            word = f"rank {rank} ({socket.gethostname()}): {summary}"
            self._store.compare_set(self._failure, "", word)
            if rank == 0:
                self._store.set(self._said, text)
            while self.keeps_store and time.monotonic() < deadline:
                if self._store.add("heard", 0) >= self.rank_info.num_ranks - 1:
                    break
                time.sleep(_POLL)


def shared_choice(name: str, value: str, environ: Mapping[str, str] = os.environ) -> str:
    """`value`, or what it was before an elastic launcher restarted this process."""
    rank_info = find_rank_info(environ)
    if not rank_info.has_agent or rank_info.address is None:
        return value
    return (Rendezvous.current or Rendezvous(rank_info, _PATIENCE)).remember(name, value)


def report_failure(
    text: str, is_lost: bool = False, environ: Mapping[str, str] = os.environ
) -> None:
    """Print why this process ends. Of what all ranks say, only rank 0's copy is printed.

    `is_lost`: for want of another process, which is no news that others may bring too. The first
    rank prints at once, the others after a moment in which they listen for the same words of it.
    """
    deadline, rank_info, rendezvous = time.monotonic() + _SOON, None, Rendezvous.current
    if rendezvous is not None:
        rank_info = rendezvous.rank_info
    elif not is_lost:
        with contextlib.suppress(OstroError):
            found = find_rank_info(environ)
            if found.num_ranks > 1 and found.address is not None and found.rank is not None:
                rank_info = found
    rank = 0 if rank_info is None else rank_info.rank or 0
    if rank_info is not None and rank:
        with contextlib.suppress(OstroError):
            rendezvous = rendezvous or Rendezvous(rank_info, timedelta(seconds=_SOON))
        if rendezvous is not None and rendezvous.hears(text, deadline):
            return
    shown = textwrap.indent(text.rstrip(), f"[rank{rank}]: " if rank else "")
    sys.stderr.write(f"{shown}\n")  # at once, lest another process's lines come between
    sys.stderr.flush()
    if rank_info is None:
        return
    with contextlib.suppress(OstroError):
        patience = (
            _PATIENCE if Rendezvous.current is None else timedelta(seconds=1 if is_lost else 3)
        )
        (rendezvous or Rendezvous(rank_info, _PATIENCE)).tell(text, patience)


def _connect(rank_info: RankInfo, keeps_store: bool, timeout: timedelta) -> dist.Store:
    host, _, port = str(rank_info.address).rpartition(":")
    host = host.strip("[]")
    deadline = time.monotonic() + timeout.total_seconds()
    attempt = min(timeout, timedelta(seconds=5))  # a signal is heeded only between two of them
    addresses = _resolve(rank_info, timeout)
    server = _listen(addresses, rank_info) if keeps_store else None
    while True:
        try:
            with quiet_torch():
                store = dist.TCPStore(
                    host, int(port),
                    is_master=keeps_store, timeout=attempt, wait_for_workers=False,
                    master_listen_fd=None if server is None else server.detach(),
                )  # fmt: skip
            store.set_timeout(timeout)
            return store
        except dist.DistError as error:
            if keeps_store:
                rule = f"rank 0 listens there, but cannot reach itself: {_first_line(error)}"
                advice = "give an address of this host that the other ranks can reach"
                raise ConfigError(_wrong_address(rank_info, rule, advice)) from error
            if time.monotonic() >= deadline:
                raise LostRankError(_absence(rank_info, [0], timeout)) from error


def _resolve(rank_info: RankInfo, timeout: timedelta) -> list[tuple[int, tuple]]:
    """The family and the socket address of each address where the ranks are to meet.

    A name may become known a little later than this process starts, as on Kubernetes.
    """
    host, _, port = str(rank_info.address).rpartition(":")
    deadline = time.monotonic() + min(timeout, _PATIENCE).total_seconds()
    while True:
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            return list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        except OSError as error:
            if time.monotonic() >= deadline:
                rule = f"the host name cannot be resolved ({error.strerror})"
                advice = "correct the name, or give the number of rank 0's host"
                raise ConfigError(_wrong_address(rank_info, rule, advice)) from error
        time.sleep(1)


def _listen(addresses: Sequence[tuple[int, tuple]], rank_info: RankInfo) -> socket.socket:
    """A socket that listens where the ranks were told to meet, and not on all interfaces.

    It does that only where the address is none of this host's, as behind a translation of
    addresses, or where the host knows its own name as a loopback address that no other reaches.
    """
    host = str(rank_info.address).rpartition(":")[0].strip("[]")
    family, address = addresses[0]
    everywhere = ("::" if family == socket.AF_INET6 else "", address[1])
    is_alone = rank_info.num_local == rank_info.num_ranks or _is_loopback_name(host)
    if not is_alone and all(ipaddress.ip_address(a[0]).is_loopback for _, a in addresses):
        address = everywhere
    try:
        try:
            return socket.create_server(address, family=family, backlog=2048)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            log.warning(
                f"{rank_info.address} is no address of this host ({socket.gethostname()}):"
                " listening on all interfaces"
            )
            return socket.create_server(everywhere, family=family, backlog=2048)
    except OSError as error:
        rule = f"rank 0 cannot listen there: {os.strerror(error.errno or 0)}"
        advice = "take a free port of this host (MASTER_PORT)"
        if error.errno == errno.EACCES:
            advice = "take a port above 1023 (MASTER_PORT)"
        raise ConfigError(_wrong_address(rank_info, rule, advice)) from error


def _is_loopback_name(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.startswith("localhost.")


def _wrong_address(rank_info: RankInfo, rule: str, advice: str) -> Problem:
    return Problem(_ADDRESS, rule, advice, rank_info.address, rank_info.address_origin)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _absence(
    rank_info: RankInfo, missing: Sequence[int], timeout: timedelta, what: str | None = None
) -> str:
    listed = ", ".join(f"{rank}{_at(rank_info, rank)}" for rank in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return (
        f"{'rank' if len(missing) == 1 else 'ranks'} {listed}{more} of {rank_info.num_ranks}"
        f" did not come to {what or rank_info.address} within trainer.distributed.timeout ="
        f" {timeout.total_seconds():g} s - see whether each was started and what it printed, and"
        " whether its host reaches that address (name, port, firewall)"
    )


def _at(rank_info: RankInfo, rank: int) -> str:
    return f" (on {rank_info.hosts[rank]})" if rank_info.hosts else ""


class _TorchLog:
    """The level of torch's C++ log, which TORCH_CPP_LOG_LEVEL sets when a process starts.

    torch has no function for it. Where the variable is not found nothing is kept quiet.
    """

    FATAL = 3

    def __init__(self) -> None:
        self._level, self._lock, self._num_inside = ctypes.c_int(), threading.Lock(), 0
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        path = Path(torch.__file__).parent / "lib" / f"libc10{suffix}"
        with contextlib.suppress(OSError, ValueError):
            self._level = ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "FLAGS_caffe2_log_level")
        self._before = self._level.value

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Log nothing that does not end the process, whichever threads are inside."""
        with self._lock:
            if self._num_inside == 0:
                self._before, self._level.value = self._level.value, self.FATAL
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if self._num_inside == 0:
                    self._level.value = self._before


@functools.cache
def _torch_log() -> _TorchLog:
    return _TorchLog()


def quiet_torch() -> contextlib.AbstractContextManager[None]:
    """Keep torch's pages of C++ frames off the terminal: what fails here is said in one line.

    Nothing else is muted. What this process prints meanwhile, from any thread, is seen.
    """
    return _torch_log().quiet()
