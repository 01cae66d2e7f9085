"""Building the token cache: documents in, token files and a ledger out.

Documents are encoded in parallel and written by one writer in their own order, so the files do
not depend on the number of workers. About every hundredth of the corpus the files are synced and
the position noted; after a kill the build goes on from the last note.
"""

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ostro.data.files import BadRecord, Shard, Unreachable
from ostro.data.source import SourceConfig
from ostro.data.store import (
    LEDGER,
    CacheDir,
    TokenStore,
    differences,
    locked,
    read_json,
    write_json,
)
from ostro.data.tokenizer import Tokenizer, without_library_threads
from ostro.errors import DataError

logger = logging.getLogger("ostro.data")

FORMAT = 1
SHARD_TOKENS = 1 << 28
"""A token file is closed at the first end of a document past this many tokens."""
PIECE_CHARS = 1 << 14
"""Long documents are encoded in pieces of about this many characters where that is exact."""
_PROGRESS, _DOCUMENTS, _QUARANTINE = "progress.json", "documents.bin", "quarantine.jsonl"
_CUT = re.compile(r"(?<=\S\n)(?=[A-Za-z0-9])")

Progress = Callable[[str, int, int], None]
"""Called with (name, done, total), in stored bytes; total 0 where unknown."""


@dataclass(frozen=True)
class CacheRequest:
    """One split of one source, and how to turn it into tokens."""

    name: str
    """Name for messages and the folder within the cache directory: `train`, `books/train`."""
    source: SourceConfig
    split: str
    tokenizer: Tokenizer
    enforce_eos: bool = True
    on_bad_record: Literal["error", "skip"] = "error"
    rebuild: bool = False
    num_workers: int | None = None
    shard_tokens: int = SHARD_TOKENS

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id if self.enforce_eos else None

    @property
    def dtype(self) -> str:
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    def key(self, shards: list[Shard] | None) -> dict[str, Any]:
        """What the cache's content depends on; without the files if they cannot be reached."""
        settings = self.source.settings(self.split)
        tokenizer = {"vocab_size": self.tokenizer.vocab_size, "eos_id": self.tokenizer.eos_id,
                     "fingerprint": self.tokenizer.fingerprint}  # fmt: skip
        key = {"format": FORMAT, "source": settings, "tokenizer": tokenizer,
               "enforce_eos": self.enforce_eos}  # fmt: skip
        if shards is not None:
            key["files"] = [[shard.name, shard.size, shard.fingerprint] for shard in shards]
        return key


@dataclass(frozen=True)
class Cache:
    """A finished cache of one split."""

    folder: Path
    ledger: dict[str, Any]
    store: TokenStore

    @property
    def num_documents(self) -> int:
        return self.ledger["documents"]

    @property
    def num_bad_records(self) -> int:
        return self.ledger["bad_records"]

    @property
    def fingerprint(self) -> str:
        """Depends on what went in, so on every token."""
        return json.dumps(_comparable(self.ledger["key"]), sort_keys=True)


def open_cache(request: CacheRequest, where: CacheDir, progress: Progress | None = None) -> Cache:
    """The finished cache of a request, built now if need be.

    Raises `DataError` when a finished cache was built from something else, naming each
    difference; when a file or record is bad; when the disk is full.
    """
    folder = where.fetch(request.name)
    ledger = read_json(folder / LEDGER)
    try:
        shards = request.source.list_shards(request.split)
    except Unreachable as error:
        if ledger is None:
            raise
        shards = None
        logger.warning("%s: using the finished cache without its files: %s", request.name, error)
    if ledger is not None and _fits(request, ledger, shards, folder):
        return _opened(folder, ledger)
    assert shards is not None, "a cache that does not fit is an error unless it can be rebuilt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            ledger = read_json(folder / LEDGER)  # another process may have finished it meanwhile
            if ledger is None or not _fits(request, ledger, shards, folder):
                (folder / LEDGER).unlink(missing_ok=True)
                _Build(request, folder, shards, progress).run()
                where.publish(request.name)
    except OSError as error:
        raise _disk_error(folder, error) from error
    ledger = read_json(folder / LEDGER)
    assert ledger is not None, "the build writes a ledger"
    return _opened(folder, ledger)


def _disk_error(folder: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{folder} - the disk is full - make room or set cache_dir to another disk; what was "
            "built is kept and the next start goes on from there"
        )
    return DataError(f"{folder} - the cache cannot be written: {error.strerror or error}")


def _comparable(key: dict[str, Any]) -> dict[str, Any]:
    """A key as it is compared: a file's content counts, its name and place do not."""
    source = {k: v for k, v in key["source"].items() if k not in ("urls", "id")}
    result = {**key, "source": source}
    if "files" in key:
        result["files"] = [file[1:] for file in key["files"]]
    return result


def _fits(request: CacheRequest, ledger: dict, shards: list[Shard] | None, folder: Path) -> bool:
    """True for a cache to use, False for one to build again; else a `DataError`."""
    was, now = ledger["key"], request.key(shards)
    if shards is None:  # nothing but the settings, places included, can be compared
        was = {k: v for k, v in was.items() if k != "files"}
        lines = differences(was, now)
    else:
        lines = [] if _comparable(was) == _comparable(now) else differences(was, now)
    if ledger["bad_records"] and request.on_bad_record == "error":
        lines.append(f"on_bad_record: the cache left out {ledger['bad_records']} bad records")
    if not lines:
        return True
    if request.rebuild and shards is not None:
        logger.warning("%s: the cache does not fit and is built again (rebuild_cache)", folder)
        return False
    listing = "\n".join(f"  {line}" for line in lines)
    raise DataError(
        f"{folder} - holds a token cache that does not fit the configuration - set another "
        f"cache_dir, delete that folder, or set rebuild_cache: true\n{listing}"
    )


def _opened(folder: Path, ledger: dict[str, Any]) -> Cache:
    size = np.dtype(ledger["dtype"]).itemsize
    paths = [folder / shard["file"] for shard in ledger["shards"]]
    for path, shard in zip(paths, ledger["shards"], strict=True):
        if not path.exists() or path.stat().st_size != shard["tokens"] * size:
            raise DataError(
                f"{path} - is missing or has the wrong size, the cache is damaged - delete {folder}"
            )
    return Cache(folder, ledger, TokenStore.open(paths, ledger["dtype"]))


Item = tuple[str, bool] | BadRecord
"""A piece of a document and whether it is the last one, or a bad record."""


def _items(request: CacheRequest, shard: Shard) -> Iterator[Item]:
    """What a shard holds, in order, the same at every start."""
    for record in request.source.read_shard(shard):
        if isinstance(record, BadRecord):
            if request.on_bad_record == "error":
                raise DataError(
                    f"{record} - mend the record, or set on_bad_record: skip to leave such "
                    "records out"
                )
            yield record
        elif record:
            yield from _pieces(record, request.tokenizer.splittable)


def _pieces(text: str, splittable: bool) -> Iterator[tuple[str, bool]]:
    start = 0
    while splittable and len(text) - start > 2 * PIECE_CHARS:
        cut = _CUT.search(text, start + PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()], False
        start = cut.start()
    yield (text[start:] if start else text), True


@dataclass
class _Batch:
    """Items for one worker, and the position behind them."""

    items: list[Item]
    shard: int
    """Index of the shard to go on with."""
    skip: int
    """Items of that shard that are done."""
    done: int
    """Stored bytes read so far, about."""

    def texts(self) -> list[tuple[str, bool]]:
        return [item for item in self.items if not isinstance(item, BadRecord)]


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: Tokenizer) -> None:
    """Set up a worker process: no handler for Ctrl-C, and no life without its parent."""
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    without_library_threads()
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a child process"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _encode_in_worker(texts: list, eos_id: int | None, dtype: str) -> tuple:
    assert _worker_tokenizer is not None, "the worker was started"
    return _encode(_worker_tokenizer, texts, eos_id, dtype)


def _encode(
    tokenizer: Tokenizer, texts: list[tuple[str, bool]], eos_id: int | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the pieces, and where in them documents end."""
    parts: list[np.ndarray] = []
    ends: list[int] = []
    length = 0
    eos = np.array([] if eos_id is None else [eos_id], dtype=dtype)
    encoded = tokenizer.encode_batch([text for text, _ in texts])
    for ids, (_, is_last) in zip(encoded, texts, strict=True):
        parts.append(ids)
        length += len(ids)
        if is_last:
            if not (len(ids) and ids[-1] == eos_id):  # a template may have added it
                parts.append(eos)
                length += len(eos)
            ends.append(length)
    tokens = np.concatenate(parts).astype(dtype, copy=False) if parts else np.array([], dtype)
    return tokens, np.array(ends, dtype=np.int64)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _workers(request: CacheRequest) -> Iterator[tuple[Executor, Callable, int]]:
    """An executor, the function to give it, and how many workers it has.

    Threads are enough for a few cores, as the library lets go of Python's lock; on more, turning
    ids into arrays would hold them up, so processes are taken.
    """
    count = request.num_workers or usable_cores()
    processes = count > (12 if request.num_workers is None else 1)
    restore = without_library_threads()
    executor: Executor
    if processes:
        executor = ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), _start_worker, (request.tokenizer,)
        )
        function: Callable = _encode_in_worker
    else:
        executor = ThreadPoolExecutor(count, "encode")

        def function(*arguments: Any) -> tuple:
            return _encode(request.tokenizer, *arguments)

    try:
        yield executor, function, count
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        restore()


class _Build:
    """One run of the builder over one split."""

    def __init__(self, request: CacheRequest, folder: Path, shards: list[Shard], progress):
        self._request, self._shards, self._progress = request, shards, progress
        self._writer = _Writer(request, folder, request.key(shards))
        self._total = sum(shard.size for shard in shards)
        self._batch_chars = min(max(self._total // 200, 1 << 14), 1 << 17)
        self._commit_chars = min(max(self._total // 100, 1 << 18), 1 << 28)

    def run(self) -> None:
        """Build to the end and write the ledger; on any interruption keep what is there."""
        request = self._request
        if self._writer.position != (0, 0):
            logger.info("%s: going on with an unfinished cache", request.name)
        since = 0
        try:
            with _workers(request) as (executor, function, count):
                calls = (
                    (batch, executor.submit(function, batch.texts(), request.eos_id, request.dtype))
                    for batch in self._batches()
                )
                for batch, future in _read_ahead(calls, 2 * count):
                    self._writer.append(batch, *future.result())
                    since += sum(len(text) for text, _ in batch.texts())
                    if since >= self._commit_chars:
                        self._writer.commit()
                        since = 0
                    if self._progress:
                        self._progress(request.name, min(batch.done, self._total), self._total)
        except BaseException:
            self._writer.commit_quietly()
            raise
        self._writer.finish()
        if self._progress:
            self._progress(request.name, self._total, self._total)

    def _batches(self) -> Iterator[_Batch]:
        first, skip = self._writer.position
        done = sum(shard.size for shard in self._shards[:first])
        items: list[Item] = []
        chars = 0
        for index in range(first, len(self._shards)):
            within, read = 0, 0
            for item in _items(self._request, self._shards[index]):
                within += 1
                size = len(item[0]) if isinstance(item, tuple) else len(item.raw)
                read += size
                if index == first and within <= skip:
                    continue
                items.append(item)
                chars += size
                if chars >= self._batch_chars:
                    yield _Batch(items, index, within, done + min(read, self._shards[index].size))
                    items, chars = [], 0
            done += self._shards[index].size
        yield _Batch(items, len(self._shards), 0, done)


def _read_ahead(calls: Iterable[tuple], count: int) -> Iterator[tuple]:
    """Keep `count` calls under way, in order."""
    pending: deque[tuple] = deque()
    for call in calls:
        pending.append(call)
        if len(pending) > count:
            yield pending.popleft()
    yield from pending


class _Writer:
    """The files of an unfinished cache: appended to, synced, and cut back after a kill."""

    def __init__(self, request: CacheRequest, folder: Path, key: dict[str, Any]):
        self._request, self._folder = request, folder
        self._itemsize = np.dtype(request.dtype).itemsize
        self._state = {
            "key": key, "dtype": request.dtype, "position": [0, 0], "shards": [], "open": False,
            "documents": 0, "bad_records": 0, "quarantine_bytes": 0,
        }  # fmt: skip
        saved = read_json(folder / _PROGRESS)
        if saved is not None and saved["key"] == key and self._is_whole(saved):
            self._state = saved
        else:
            if saved is not None:
                logger.warning("%s: an unfinished cache of other data is thrown away", folder)
            for path in folder.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._tokens = sum(shard["tokens"] for shard in self._state["shards"])
        self._documents = self._open(_DOCUMENTS, self._state["documents"] * 8)
        self._quarantine = self._open(_QUARANTINE, self._state["quarantine_bytes"])
        self._file = None
        if self._state["open"]:
            last = self._state["shards"][-1]
            self._file = self._open(last["file"], last["tokens"] * self._itemsize)
        self._torn = False

    def _is_whole(self, state: dict[str, Any]) -> bool:
        sizes = {shard["file"]: shard["tokens"] * self._itemsize for shard in state["shards"]}
        sizes |= {_DOCUMENTS: state["documents"] * 8, _QUARANTINE: state["quarantine_bytes"]}
        paths = {self._folder / name: size for name, size in sizes.items()}
        return all(p.exists() and p.stat().st_size >= size for p, size in paths.items())

    def _open(self, name: str, size: int):
        file = open(self._folder / name, "ab")  # noqa: SIM115 - closed by finish
        file.truncate(size)
        return file

    @property
    def position(self) -> tuple[int, int]:
        """Shard to go on with, and its items that are done."""
        shard, skip = self._state["position"]
        return shard, skip

    def append(self, batch: _Batch, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Add a batch; nothing counts before the next `commit`."""
        self._torn = True
        self._documents.write((ends + self._tokens).astype("<i8").tobytes())
        start = 0
        while start < len(tokens):
            if self._file is None:
                self._next_file()
            current = self._state["shards"][-1]
            room = max(self._request.shard_tokens - current["tokens"], 1)
            index = int(np.searchsorted(ends, start + room))
            stop = int(ends[index]) if index < len(ends) else len(tokens)
            self._file.write(tokens[start:stop].astype(tokens.dtype.newbyteorder("<")).tobytes())
            current["tokens"] += stop - start
            if index < len(ends):
                self._close_file()
            start = stop
        for item in batch.items:
            if isinstance(item, BadRecord):
                line = json.dumps(vars(item), ensure_ascii=False) + "\n"
                self._state["quarantine_bytes"] += self._quarantine.write(line.encode())
                self._state["bad_records"] += 1
        self._tokens += len(tokens)
        self._state["documents"] += len(ends)
        self._state["position"] = [batch.shard, batch.skip]
        self._torn = False

    def _next_file(self) -> None:
        name = f"tokens-{len(self._state['shards']):05d}.bin"
        self._state["shards"].append({"file": name, "tokens": 0})
        self._state["open"] = True
        self._file = self._open(name, 0)

    def _close_file(self) -> None:
        _sync(self._file)
        self._file.close()
        self._file, self._state["open"] = None, False

    def commit(self) -> None:
        """Make what was appended durable and note the position behind it."""
        for file in (self._file, self._documents, self._quarantine):
            if file is not None:
                _sync(file)
        write_json(self._folder / _PROGRESS, self._state)

    def commit_quietly(self) -> None:
        """Commit on the way out of an error, if the last batch is whole and the disk lets us."""
        files = [file for file in (self._file, self._documents, self._quarantine) if file]
        with suppress(OSError):
            if not self._torn:
                self.commit()
        for file in files:
            with suppress(OSError):
                file.close()

    def finish(self) -> None:
        """Turn the files into a finished cache: the ledger is written last."""
        request, state = self._request, self._state
        self.commit()
        for file in (self._file, self._documents, self._quarantine):
            if file is not None:
                file.close()
        bad = state["bad_records"]
        if bad:
            logger.warning(
                "%s: left out %d bad records, listed in %s",
                request.name, bad, self._folder / _QUARANTINE,
            )  # fmt: skip
        else:
            (self._folder / _QUARANTINE).unlink()
        if not self._tokens:
            raise DataError(
                f"{request.name} - the corpus is empty: none of its {len(state['key']['files'])} files "
                "holds text - check the files and text_key"
            )
        names = [shard["file"] for shard in state["shards"]]
        names += [_DOCUMENTS, _QUARANTINE] if bad else [_DOCUMENTS]
        kept = {k: state[k] for k in ("key", "dtype", "shards", "documents", "bad_records")}
        write_json(self._folder / LEDGER, {**kept, "tokens": self._tokens, "stored": names})
        (self._folder / _PROGRESS).unlink()


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
