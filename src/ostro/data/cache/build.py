"""Building the token cache: documents in, token files and a ledger out.

Documents are encoded in parallel and written by one writer in their own order, so the files do
not depend on the number of workers. About every hundredth of the corpus the position is noted, and
every second the files are synced; after a kill the build goes on from the last note. Source files
are hashed as they are read.
"""

import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ostro.core.errors import DataError
from ostro.core.redaction import redact
from ostro.data.cache import checksums
from ostro.data.cache.documents import ROW, DocumentIndex, Documents, TokenFiles
from ostro.data.cache.encode import Encoded, Piece, encoder, pieces
from ostro.data.cache.fingerprints import file_list, require_as_listed
from ostro.data.cache.identity import LISTING, STAMPS, Stamps
from ostro.data.cache.request import CacheRequest
from ostro.data.cache.store import LEDGER, CacheDir, TokenStore, is_own, write_json
from ostro.data.sources.files import BadRecord, Shard
from ostro.io.json_schema import FILE_NAME, matches_schema

logger = logging.getLogger("ostro.data")

_PROGRESS, _TOKENS, _QUARANTINE = "progress.jsonl", "tokens-00000.bin", "quarantine.jsonl"
_INDEX, _PRINTS = "documents.bin", "sources.jsonl"
_SYNC_SECONDS = 1.0
FILES = [(str, int, str)]
"""How a ledger lists what was read: name, size, fingerprint."""
_LEDGER = {
    "key": {"files": FILES}, "dtype": re.compile("uint16|uint32"), "documents": int,
    "bad_records": int, "shards": [{"file": FILE_NAME, "tokens": int}], "stored": [FILE_NAME],
}  # fmt: skip
_NOTE = {
    "key": str, "position": (int, int), "documents": int, "bad_records": int,
    "files": dict.fromkeys((_TOKENS, _INDEX, _QUARANTINE, _PRINTS), (int, int, int)),
    "special_tokens": {re.compile(".*", re.DOTALL): int},
}  # fmt: skip

Progress = Callable[[str, int, int], None]
"""Called with (name, done, total), in stored bytes; total 0 where unknown."""


@dataclass(frozen=True)
class Cache:
    """A finished cache of one split."""

    folder: Path
    store: TokenStore
    documents: Documents
    files: list[list]
    """Name, size and fingerprint of each file it was made from."""
    num_documents: int
    num_bad_records: int
    fingerprint: str
    """Depends on what went in, so on every token."""


def open_cache(request: CacheRequest, where: CacheDir, progress: Progress | None = None) -> Cache:
    """The finished cache of a request, built now if need be.

    Raises `DataError` when a finished cache was built from something else, naming each
    difference; when a file or record is bad; when the disk is full; when there is none and it
    `must_exist`.
    """

    def build(folder: Path, shards: list[Shard]) -> None:
        if request.missing_end and not request.tokenizer.may_lack_end:
            raise DataError(request.missing_end)
        _Build(request, folder, shards, progress).run()

    folder, ledger = where.finished(
        request.name,
        _LEDGER,
        lambda: request.source.list_shards(request.split),
        request.fits,
        build,
        request.must_exist,
    )
    if request.missing_end:
        logger.warning("%s", request.missing_end)
    return _opened(folder, ledger, request)


def _opened(folder: Path, ledger: dict[str, Any], request: CacheRequest) -> Cache:
    size = np.dtype(ledger["dtype"]).itemsize
    paths = {str(folder / shard["file"]): shard["tokens"] for shard in ledger["shards"]}
    sizes = {path: tokens * size for path, tokens in paths.items()}
    if has_index := "index" in ledger:
        sizes[str(folder / _INDEX)] = ledger["documents"] * ROW.itemsize
    for path, expected in sizes.items():
        if not os.path.exists(path) or os.path.getsize(path) != expected:
            raise DataError(
                f"{path} - is missing or has the wrong size, the cache is damaged - delete {folder}"
            )
    has_checksums = checksums.verify(folder, ledger, whole=request.verify)
    key = {k: v for k, v in ledger["key"].items() if k != "places"}
    names = [file[0] for file in key["files"]]
    key["files"] = [file[1:] for file in key["files"]]
    advice = f"the cache is damaged: delete {folder}, and it is built again at the next start"
    num_ids = request.tokenizer.vocab_size
    store = TokenStore.open(list(paths), ledger["dtype"], num_ids, advice)
    if request.verify:
        _verify_ids(request.name, store, num_ids, has_checksums)
    if has_index:
        documents = DocumentIndex(folder / _INDEX, names)
    else:  # as earlier versions wrote it
        documents = TokenFiles(store, list(paths.items()), key["tokenizer"]["eos_id"])
    return Cache(
        folder,
        store,
        documents,
        ledger["key"]["files"],
        ledger["documents"],
        ledger["bad_records"],
        json.dumps(key, sort_keys=True),
    )


def _verify_ids(name: str, store: TokenStore, num_ids: int, has_checksums: bool) -> None:
    largest, position = store.largest()
    if largest >= num_ids:
        raise store.out_of_range(largest, position)
    if has_checksums:
        logger.info("%s: intact, all files are as they were written", name)
    else:
        logger.warning("%s: built by an earlier version, without checksums: only sizes and the "
                       "range of the ids were verified", name)  # fmt: skip


@dataclass
class _Batch:
    """Items for one worker, and the position behind them."""

    items: list[tuple[int, Piece | BadRecord]]  # index of an item's shard, and the item
    shard: int  # index of the shard to go on with
    skip: int  # items of that shard that are done
    done: int  # stored bytes read so far, about
    chars: int
    prints: list[tuple[int, str]]  # indices and fingerprints of shards that were read to the end

    def texts(self) -> list[Piece]:
        return [item for _, item in self.items if isinstance(item, Piece)]


class _Build:
    """One run of the builder over one split."""

    def __init__(self, request: CacheRequest, folder: Path, shards: list[Shard],
                 progress: Progress | None):  # fmt: skip
        self._request, self._shards = request, shards
        self._progress = progress or (lambda name, done, total: None)
        self._stamps = Stamps(folder)
        # Until they have been read, files are known by their stamps.
        known = [shard.fingerprint or repr(shard.stamps) for shard in shards]
        self._writer = _Writer(request, folder, request.key(file_list(shards, known)))
        self._total = sum(shard.size for shard in shards)
        self._commit_chars = min(max(self._total // 100, 1 << 16), 1 << 28)

    def run(self) -> None:
        """Build to the end and write the ledger; on any interruption keep what is there."""
        request, writer, since = self._request, self._writer, 0
        if writer.position != (0, 0):
            logger.info("%s: going on with an unfinished cache", request.name)
        settings = (request.tokenizer, request.eos_id, request.dtype, request.num_workers)
        special_tokens = request.special_tokens
        try:
            with encoder(*settings, request.ray_address, special_tokens) as workers:
                # A kill costs what was read ahead (two batches a worker) and what was not yet
                # noted: together under a twentieth of all but tiny corpora.
                size = min(max(self._total // (80 * workers.num_workers), 1 << 12), 1 << 17)
                for batch, encoded in workers.run(self._batches(size), _Batch.texts):
                    writer.append(batch, encoded)
                    since += batch.chars
                    if since >= self._commit_chars:
                        writer.commit(sync=False)
                        since = 0
                    self._progress(request.name, min(batch.done, self._total), self._total)
            prints = self._prints()
            writer.finish(file_list(self._shards, prints))
            self._keep_stamps(prints)
        except BaseException:
            writer.commit_quietly()
            raise
        self._progress(request.name, self._total, self._total)

    def _prints(self) -> list[str]:
        """The fingerprint of every shard, now that all have been read."""
        read = self._writer.read_prints()
        return [
            shard.fingerprint or read.get(index) or shard.hash_files()
            for index, shard in enumerate(self._shards)
        ]

    def _keep_stamps(self, prints: list[str]) -> None:
        for shard, print_ in zip(self._shards, prints, strict=True):
            if not shard.fingerprint:
                self._stamps.put(shard.stamps, print_)
        self._stamps.save()

    def _batches(self, batch_chars: int) -> Iterator[_Batch]:
        first, skip = self._writer.position
        done = sum(shard.size for shard in self._shards[:first])
        items: list[tuple[int, Piece | BadRecord]] = []
        prints: list[tuple[int, str]] = []
        chars = 0
        for index in range(first, len(self._shards)):
            shard, read = self._shards[index], 0
            reading = _Reading(self._items(shard))
            for within, item in enumerate(reading, 1):
                size = len(item.raw) if isinstance(item, BadRecord) else len(item.text)
                read += size
                if index == first and within <= skip:
                    continue
                items.append((index, item))
                chars += size
                if chars >= batch_chars:
                    at = done + min(read, shard.size)
                    yield _Batch(items, index, within, at, chars, prints)
                    items, prints, chars = [], [], 0
            if reading.result:
                prints.append((index, reading.result))
            done += shard.size
        yield _Batch(items, len(self._shards), 0, done, chars, prints)

    def _items(self, shard: Shard) -> Generator[Piece | BadRecord, None, str | None]:
        """What a shard holds, in order, the same at every start; returns its fingerprint."""
        records = _Reading(self._request.source.read_shard(shard))
        for item in pieces(records, self._request.tokenizer.splittable):
            if isinstance(item, BadRecord) and self._request.on_bad_record == "error":
                raise DataError(f"{item} - mend the record, or leave such records out with "
                                "on_bad_record: skip")  # fmt: skip
            yield item
        require_as_listed(shard)
        return None if shard.fingerprint else records.result or shard.hash_files()


class _Reading(Iterable[Any]):
    """Goes through an iterator once and keeps what a generator returns at its end."""

    def __init__(self, records: Iterable[Any]):
        self._records, self.result = records, None

    def __iter__(self) -> Iterator[Any]:
        self.result = yield from self._records


class _Writer:
    """The files of an unfinished cache: appended to, noted, and cut back after a kill.

    A note says how long the files are and which checksum has what was added since the last sync,
    so that it counts without a sync of its own: a kill loses nothing behind it, and after a power
    failure the last note that holds is gone back to.
    """

    def __init__(self, request: CacheRequest, folder: Path, key: dict[str, Any]):
        self._request, self._folder = request, folder
        print_ = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._state: dict[str, Any] = {
            "key": print_, "position": [0, 0], "documents": 0, "bad_records": 0,
            # name: bytes, of these synced, CRC of the others
            "files": {name: [0, 0, 0] for name in _NOTE["files"]},
            "special_tokens": {},
        }  # fmt: skip
        notes = folder / _PROGRESS
        lines = notes.read_bytes().splitlines(keepends=True) if notes.exists() else []
        found = bool(lines)
        while lines and not self._holds(lines[-1]):
            lines.pop()
        if lines:
            self._state = json.loads(lines[-1])
        else:
            if found:
                logger.warning("%s: an unfinished cache that does not fit is thrown away", folder)
            for path in folder.iterdir():
                if is_own(path) or path.name in (STAMPS, LISTING):
                    path.unlink()
        sizes = {name: size for name, (size, _, _) in self._state["files"].items()}
        self._files: dict[str, BinaryIO] = {}
        for name, size in {**sizes, _PROGRESS: sum(map(len, lines))}.items():
            self._files[name] = open(folder / name, "ab")  # noqa: SIM115 - closed by finish
            self._files[name].truncate(size)
        self._torn, self._synced = False, time.monotonic()

    def _holds(self, line: bytes) -> bool:
        """Whether a note is whole, of this cache, and true of the files."""
        try:
            note = json.loads(line)
            if not matches_schema(note, _NOTE) or note["files"].keys() != _NOTE["files"].keys():
                return False  # of an earlier version, or damaged
            if note["key"] != self._state["key"] or not line.endswith(b"\n"):
                return False
            for name, (size, synced, crc) in note["files"].items():
                with open(self._folder / name, "rb") as file:
                    if not 0 <= synced <= size <= file.seek(0, os.SEEK_END):
                        return False
                    file.seek(synced)
                    data = file.read(size - synced)
                if zlib.crc32(data) != crc:
                    return False
        except (ValueError, RecursionError, FileNotFoundError):
            return False
        return True

    @property
    def position(self) -> tuple[int, int]:
        """Shard to go on with, and its items that are done."""
        shard, skip = self._state["position"]
        return shard, skip

    def append(self, batch: _Batch, encoded: Encoded) -> None:
        """Add a batch; nothing counts before the next `commit`."""
        self._torn, state, tokens = True, self._state, encoded.tokens
        stops = iter((np.cumsum(encoded.lengths) + self._num_tokens).tolist())
        rows = []
        for name, count in encoded.spelled.items():
            state["special_tokens"][name] = state["special_tokens"].get(name, 0) + count
        little_endian = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
        self._write(_TOKENS, little_endian.tobytes())
        for shard, item in batch.items:
            if isinstance(item, BadRecord):
                record = {**vars(item), "file": redact(item.file)}
                line = json.dumps(record, ensure_ascii=False) + "\n"
                self._write(_QUARANTINE, line.encode())
                state["bad_records"] += 1
                continue
            stop = next(stops)
            if item.is_last:
                rows.append((stop, shard, item.record, item.byte))
        self._write(_INDEX, np.array(rows, dtype=ROW).tobytes())
        for index, print_ in batch.prints:
            self._write(_PRINTS, json.dumps([index, print_]).encode() + b"\n")
        state["documents"] += len(rows)
        state["position"] = [batch.shard, batch.skip]
        self._torn = False

    @property
    def _num_tokens(self) -> int:
        return self._state["files"][_TOKENS][0] // np.dtype(self._request.dtype).itemsize

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        file = self._state["files"][name]
        file[0], file[2] = file[0] + len(data), zlib.crc32(data, file[2])

    def commit(self, sync: bool = True) -> None:
        """Note what was appended; now and then, and with `sync`, make it durable."""
        sync = sync or time.monotonic() - self._synced >= _SYNC_SECONDS
        for name, entry in self._state["files"].items():
            self._files[name].flush()
            if sync:
                os.fsync(self._files[name].fileno())
                entry[1:] = entry[0], 0
        self._files[_PROGRESS].write(json.dumps(self._state).encode() + b"\n")
        self._files[_PROGRESS].flush()
        if sync:
            os.fsync(self._files[_PROGRESS].fileno())
            self._synced = time.monotonic()

    def commit_quietly(self) -> None:
        """Commit on the way out of an error, if the last batch is whole and the disk lets us."""
        with suppress(OSError):
            if not self._torn:
                self.commit()
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def read_prints(self) -> dict[int, str]:
        """Fingerprints of the shards that have been read to their end, by index."""
        self._files[_PRINTS].flush()
        return dict(map(json.loads, (self._folder / _PRINTS).read_bytes().splitlines()))

    def finish(self, files: list[list]) -> None:
        """Turn what was written into the cache of these files: the ledger is written last."""
        request, state = self._request, self._state
        self.commit()
        self._torn = True  # from here on there is nothing to commit
        for file in self._files.values():
            file.close()
        bad = state["bad_records"]
        if bad:
            logger.warning(
                "%s: left out %d bad records, listed in %s",
                request.name, bad, self._folder / _QUARANTINE,
            )  # fmt: skip
        else:
            (self._folder / _QUARANTINE).unlink()
        tokens = self._num_tokens
        if not tokens:
            raise DataError(
                f"{request.name} - the corpus is empty: {len(files)} files hold "
                "no text - check the files and text_key"
            )
        kept = {"tokens": tokens, "documents": state["documents"], "bad_records": bad}
        kept["special_tokens"] = state["special_tokens"]
        self._report_special_tokens(state["special_tokens"])
        kept["shards"] = [{"file": _TOKENS, "tokens": tokens}]
        kept["index"] = _INDEX
        kept["checksums"] = checksums.write(self._folder, [_TOKENS, _INDEX])
        kept["stored"] = [_TOKENS, _INDEX, checksums.FILE, *([_QUARANTINE] if bad else [])]
        key = request.key(files)
        write_json(self._folder / LEDGER, {"key": key, "dtype": request.dtype, **kept})
        (self._folder / _PROGRESS).unlink()
        (self._folder / _PRINTS).unlink()

    def _report_special_tokens(self, spelled: dict[str, int]) -> None:
        """Say how often the text spells special tokens, and what has become of them."""
        if not spelled:
            return
        listed = ", ".join(f"{name} {count:,}" for name, count in list(spelled.items())[:8])
        became = {
            "text": "they stay text (data.special_tokens: text)",
            "parse": "each is read as the token (data.special_tokens: parse)",
        }[self._request.special_tokens]
        logger.warning(
            "%s: the text spells special tokens %s times (%s); %s",
            self._request.name, f"{sum(spelled.values()):,}", listed, became,
        )  # fmt: skip
