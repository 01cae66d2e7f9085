"""Building the token cache: documents in, token files and a ledger out.

Documents are encoded in parallel and written by one writer in their own order, so the files do
not depend on the number of workers. About every hundredth of the corpus the position is noted, and
every second the files are synced; after a kill the build goes on from the last note.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ostro.data.documents import ROW, DocumentIndex, Documents, TokenFiles
from ostro.data.encode import Encoded, Piece, encoder, pieces
from ostro.data.files import BadRecord, Shard
from ostro.data.source import SourceConfig
from ostro.data.store import LEDGER, CacheDir, TokenStore, fits, write_json
from ostro.data.tokenizer import SpecialTokens, Tokenizer
from ostro.errors import DataError
from ostro.secrets import redact, redacted
from ostro.shapes import FILE_NAME, has_shape

logger = logging.getLogger("ostro.data")

FORMAT = 1
_PROGRESS, _TOKENS, _QUARANTINE = "progress.jsonl", "tokens-00000.bin", "quarantine.jsonl"
_INDEX = "documents.bin"
_SYNC_SECONDS = 1.0
FILES = [(str, int, str)]
"""How a ledger lists what was read: name, size, fingerprint."""
_LEDGER = {
    "key": {"files": FILES}, "dtype": re.compile("uint16|uint32"), "documents": int,
    "bad_records": int, "shards": [{"file": FILE_NAME, "tokens": int}], "stored": [FILE_NAME],
}  # fmt: skip
_NOTE = {
    "key": str, "position": (int, int), "documents": int, "bad_records": int,
    "files": dict.fromkeys((_TOKENS, _INDEX, _QUARANTINE), (int, int, int)),
    "special_tokens": {re.compile(".*", re.DOTALL): int},
}  # fmt: skip

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
    special_tokens: SpecialTokens = "text"
    on_bad_record: Literal["error", "skip"] = "error"
    rebuild: bool = False
    num_workers: int | None = None
    ray_address: str | None = None
    """Ray cluster that encodes in place of local workers."""
    must_exist: bool = False
    """Open a finished cache, and build none."""

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id if self.enforce_eos else None

    @property
    def missing_end(self) -> str | None:
        """Why documents cannot be ended although they should be."""
        if not self.enforce_eos or self.tokenizer.eos_id is not None:
            return None
        return (
            f"{self.name}: data.enforce_eos = true - {self.tokenizer.no_end()}, or"
            " data.enforce_eos: false to let documents follow each other without an end"
        )

    @property
    def dtype(self) -> str:
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    def key(self, shards: list[Shard] | None) -> dict[str, Any]:
        """What the cache's content depends on; without the files if they cannot be reached."""
        tokenizer = {"vocab_size": self.tokenizer.vocab_size, "eos_id": self.tokenizer.eos_id,
                     "fingerprint": self.tokenizer.fingerprint}  # fmt: skip
        key = {"format": FORMAT, "source": self.source.settings(self.split),
               "places": redacted(self.source.places(self.split)), "tokenizer": tokenizer,
               "enforce_eos": self.enforce_eos}  # fmt: skip
        if self._has_special_text:
            key["special_tokens"] = "text"
        return key if shards is None else {**key, "files": file_list(shards)}

    @property
    def _has_special_text(self) -> bool:
        """Whether the key notes it; caches without the note were made by parsing, as all once."""
        return self.special_tokens == "text" and bool(self.tokenizer.special_tokens)

    def fits(self, folder: Path, ledger: dict, shards: list[Shard] | None) -> bool:
        """Whether a finished cache is the requested one; False only if it may be rebuilt."""
        bad = ledger["bad_records"] if self.on_bad_record == "error" else 0
        more = [f"on_bad_record: {bad} bad records were left out"] if bad else []
        was, now = dict(ledger["key"]), self.key(shards)
        modes = [key.pop("special_tokens", "parse") for key in (was, now)]
        if len(set(modes)) > 1 and was.get("tokenizer") == now["tokenizer"]:
            more.append(self._other_special_tokens())
        return fits(folder, was, now, self.rebuild, more)

    def _other_special_tokens(self) -> str:
        was = "parse" if self._has_special_text else "text"
        note = ", as all caches of earlier versions" if was == "parse" else ""
        return (
            f"special_tokens: built with {was}{note}, the configuration has {self.special_tokens}"
            f" - data.special_tokens: {was} keeps this cache"
        )


def file_list(shards: list[Shard]) -> list[list]:
    """Shards as a ledger records them."""
    return [[redact(shard.name), shard.size, shard.fingerprint] for shard in shards]


@dataclass(frozen=True)
class Cache:
    """A finished cache of one split."""

    folder: Path
    store: TokenStore
    documents: Documents
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
    return _opened(folder, ledger)


def _opened(folder: Path, ledger: dict[str, Any]) -> Cache:
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
    key = {k: v for k, v in ledger["key"].items() if k != "places"}
    names = [file[0] for file in key["files"]]
    key["files"] = [file[1:] for file in key["files"]]
    store = TokenStore.open(list(paths), ledger["dtype"])
    if has_index:
        documents = DocumentIndex(folder / _INDEX, names)
    else:  # as earlier versions wrote it
        documents = TokenFiles(store, list(paths.items()), key["tokenizer"]["eos_id"])
    return Cache(
        folder, store, documents, ledger["documents"], ledger["bad_records"],
        json.dumps(key, sort_keys=True),
    )  # fmt: skip


@dataclass
class _Batch:
    """Items for one worker, and the position behind them."""

    items: list[tuple[int, Piece | BadRecord]]  # index of an item's shard, and the item
    shard: int  # index of the shard to go on with
    skip: int  # items of that shard that are done
    done: int  # stored bytes read so far, about
    chars: int

    def texts(self) -> list[Piece]:
        return [item for _, item in self.items if isinstance(item, Piece)]


class _Build:
    """One run of the builder over one split."""

    def __init__(self, request: CacheRequest, folder: Path, shards: list[Shard],
                 progress: Progress | None):  # fmt: skip
        self._request, self._shards = request, shards
        self._progress = progress or (lambda name, done, total: None)
        self._writer = _Writer(request, folder, request.key(shards))
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
            writer.finish()
        except BaseException:
            writer.commit_quietly()
            raise
        self._progress(request.name, self._total, self._total)

    def _batches(self, batch_chars: int) -> Iterator[_Batch]:
        first, skip = self._writer.position
        done = sum(shard.size for shard in self._shards[:first])
        items: list[tuple[int, Piece | BadRecord]] = []
        chars = 0
        for index in range(first, len(self._shards)):
            shard, read = self._shards[index], 0
            for within, item in enumerate(self._items(shard), 1):
                size = len(item.raw) if isinstance(item, BadRecord) else len(item.text)
                read += size
                if index == first and within <= skip:
                    continue
                items.append((index, item))
                chars += size
                if chars >= batch_chars:
                    yield _Batch(items, index, within, done + min(read, shard.size), chars)
                    items, chars = [], 0
            done += shard.size
        yield _Batch(items, len(self._shards), 0, done, chars)

    def _items(self, shard: Shard) -> Iterator[Piece | BadRecord]:
        """What a shard holds, in order, the same at every start."""
        records = self._request.source.read_shard(shard)
        for item in pieces(records, self._request.tokenizer.splittable):
            if isinstance(item, BadRecord) and self._request.on_bad_record == "error":
                raise DataError(f"{item} - mend the record, or leave such records out with "
                                "on_bad_record: skip")  # fmt: skip
            yield item


class _Writer:
    """The files of an unfinished cache: appended to, noted, and cut back after a kill.

    A note says how long the files are and which checksum has what was added since the last sync,
    so that it counts without a sync of its own: a kill loses nothing behind it, and after a power
    failure the last note that holds is gone back to.
    """

    def __init__(self, request: CacheRequest, folder: Path, key: dict[str, Any]):
        self._request, self._folder, self._key = request, folder, key
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
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
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
            if not has_shape(note, _NOTE) or note["files"].keys() != _NOTE["files"].keys():
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

    def finish(self) -> None:
        """Turn the files into a finished cache: the ledger is written last."""
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
                f"{request.name} - the corpus is empty: {len(self._key['files'])} files hold "
                "no text - check the files and text_key"
            )
        kept = {"tokens": tokens, "documents": state["documents"], "bad_records": bad}
        kept["special_tokens"] = state["special_tokens"]
        self._report_special_tokens(state["special_tokens"])
        kept["shards"] = [{"file": _TOKENS, "tokens": tokens}]
        kept["index"] = _INDEX
        kept["stored"] = [_TOKENS, _INDEX, *([_QUARANTINE] if bad else [])]
        write_json(self._folder / LEDGER, {"key": self._key, "dtype": request.dtype, **kept})
        (self._folder / _PROGRESS).unlink()

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
