"""Files that hold documents: finding them, opening them, reading their records.

Everything here takes a local path or any URL that `fsspec` knows. A file that cannot be read to
its end is a `DataError` that names it; a record that cannot be used is a `BadRecord`, and the
caller decides what happens with it.
"""

import glob
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec
import pyarrow
import pyarrow.parquet
from fsspec.utils import infer_compression

from ostro.errors import DataError, did_you_mean
from ostro.secrets import with_secrets
from ostro.units import expand_braces

FORMATS = ("text", "jsonl", "json", "parquet")
_TEXT_SUFFIXES = frozenset(
    ["txt", "text", "md", "markdown", "rst", "tex", "org", "html", "htm", "xml", "csv", "tsv",
     "log", "py", "pyi", "ipynb", "c", "h", "cc", "cpp", "hpp", "cu", "java", "js", "ts", "go",
     "rs", "rb", "php", "pl", "sh", "sql", "swift", "kt", "scala", "lua", "r", "jl", "hs", "ml"]
)  # fmt: skip
_BLOCK = 1 << 16
_WHOLE_FILE = 16 << 20
_RAW_LENGTH = 200
_BOMB_RATIO, _BOMB_FREE = 1000, 64 << 20


class Unreachable(DataError):
    """A source's files cannot be reached now; a complete cache may stand in for them."""


@dataclass(frozen=True)
class BadRecord:
    """A record that holds no usable text."""

    file: str
    where: str
    reason: str
    raw: str = ""

    def __str__(self) -> str:
        return f"{self.file}, {self.where} - {self.reason}"


class Document(str):
    """A text that knows where it stands in its file."""

    __slots__ = ("byte", "record")
    record: int
    """1-based number of its line, where records are lines."""
    byte: int
    """Bytes before it in the file, decompressed."""

    def __new__(cls, text: str, record: int, byte: int):
        document = super().__new__(cls, text)
        document.record, document.byte = record, byte
        return document


@dataclass(frozen=True)
class Shard:
    """One file (or one part of a data set): the unit in which a source is listed and read."""

    name: str
    size: int  # stored bytes; 0 where unknown
    fingerprint: str  # depends on the content (or the remote's checksum), not on place or time
    format: str = "text"  # how to read it; a data set's own name of the split


def find_files(patterns: Sequence[str], setting: str) -> list[str]:
    """Expand braces, then globs, in the order given; every mistake in one `DataError`."""
    found: list[str] = []
    wrong: list[str] = []
    urls: list[str] = []
    for pattern in patterns:
        try:
            urls += expand_braces(pattern)
        except ValueError as error:
            wrong.append(f"{pattern}: {error}")
    for url in urls:
        try:
            paths = _matches(url)
        except (OSError, ImportError, ValueError) as error:
            wrong.append(f"{url}: {_reason(error)}")
            continue
        if not paths:
            is_glob = any(c in url for c in "*?[")
            wrong.append(f"{url}: {'the pattern matches no file' if is_glob else 'no such file'}")
        for path in paths:
            if path in found:
                wrong.append(f"{path}: listed twice")
            found.append(path)
    if wrong:
        listing = "\n".join(f"  {line}" for line in wrong)
        raise Unreachable(
            f"{setting} - {len(wrong)} of its files cannot be used - correct the path, make the "
            f"file, or take it off the list:\n{listing}"
        )
    return found


def _matches(url: str) -> list[str]:
    if is_local(url):
        path = _local(url)
        if not os.path.exists(path) and any(c in path for c in "*?["):
            return sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if os.path.isdir(path):
            raise ValueError(f"is a folder; name its files, for example {path.rstrip('/')}/*.txt")
        return [path] if os.path.exists(path) else []
    system, path = located(url)
    if any(c in path for c in "*?["):
        return sorted(system.unstrip_protocol(p) for p in system.glob(path) if system.isfile(p))
    if system.isdir(path):
        raise ValueError(f"is a folder; name its files, for example {url.rstrip('/')}/*.jsonl")
    return [url] if system.exists(path) else []


def located(url: str) -> tuple[Any, str]:
    """The file system and the path in it that a URL names, credentials filled in."""
    return fsspec.core.url_to_fs(with_secrets(url))


def is_local(url: str) -> bool:
    """Whether a path lies in this machine's own file system."""
    filled = with_secrets(url)
    return "://" not in filled or filled.startswith("file://")


def _local(url: str) -> str:
    return os.path.expanduser(with_secrets(url).removeprefix("file://"))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}".strip() or type(error).__name__


def guess_format(path: str, given: str = "auto") -> str:
    """The format of a file by its name, unless one is given."""
    if given != "auto":
        return given
    name = PurePosixPath(path.split("?")[0]).name.lower()
    if compression_of(path):
        name = name.rsplit(".", 1)[0]
    suffix = name.rsplit(".", 1)[-1] if "." in name else ""
    if suffix in ("jsonl", "ndjson"):
        return "jsonl"
    if suffix in ("json", "parquet"):
        return suffix
    if suffix in _TEXT_SUFFIXES:
        return "text"
    raise DataError(
        f"{path} - nothing is known about files ending in {'.' + suffix if suffix else 'no suffix'}"
        f" - set format to one of {', '.join(FORMATS)}"
    )


def compression_of(path: str) -> str | None:
    """`gzip`, `zstd`, ... by the file's name, or None."""
    lowered = path.split("?")[0].lower()
    return "zstd" if lowered.endswith((".zst", ".zstd")) else infer_compression(lowered)


def make_shard(path: str, format: str) -> Shard:
    """Describe a file that exists: size and fingerprint."""
    try:
        system, inner = located(path)
        info = system.info(inner)
        size = int(info.get("size") or 0)
        for key in ("ETag", "etag", "md5Hash", "crc32c", "checksum"):
            if info.get(key):
                return Shard(path, size, f"{key}:{info[key]}", format)
        with system.open(inner, "rb") as file:
            return Shard(path, size, _content_hash(file, size), format)
    except (OSError, ImportError) as error:
        raise Unreachable(f"{path} - cannot be opened: {_reason(error)}") from error


def _content_hash(file: BinaryIO, size: int) -> str:
    """The whole content of small files; size and evenly spaced blocks of large ones."""
    digest = hashlib.sha256(str(size).encode())
    if size <= _WHOLE_FILE:
        while block := file.read(1 << 20):
            digest.update(block)
    else:
        for index in range(64):
            file.seek(index * (size - _BLOCK) // 63)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


class _Bounded(io.RawIOBase):
    """Decompressed bytes, up to a limit: a small file can hold gigabytes of nothing."""

    def __init__(self, stream: Any, size: int):
        self._stream, self._left = stream, max(_BOMB_FREE, _BOMB_RATIO * size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it holds more than {_BOMB_RATIO} times its own size")
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A file's decompressed bytes."""
    compression = compression_of(path)
    by_arrow = compression in ("gzip", "zstd")  # several frames too; notices truncation
    system, inner = located(path)
    with system.open(inner, "rb", compression=None if by_arrow else compression) as file:
        if by_arrow:
            file = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), compression)
        if compression:
            bounded = _Bounded(file, system.size(inner) or 0)
            file = io.BufferedReader(bounded, 1 << 18)
        yield file


def read_file(path: str, format: str, text_key: str) -> Iterator[str | BadRecord]:
    """The documents of a file in order; a damaged file is a `DataError`."""
    reader = {"text": _text, "jsonl": _json_lines, "json": _json, "parquet": _parquet}[format]
    try:
        with _opened(path) as file:
            yield from reader(file, path, text_key)
    except (OSError, ImportError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise _damaged(path, error) from error
        raise Unreachable(f"{path} - cannot be opened: {_reason(error)}") from error
    except DataError:
        raise
    except Exception as error:  # what is compressed or parquet, and damaged, raises almost anything
        raise _damaged(path, error) from error


def _damaged(path: str, error: BaseException) -> DataError:
    return DataError(
        f"{path} - cannot be read to its end: {_reason(error)} - the file is damaged or cut off; "
        "fetch or make it again, or take it off the list"
    )


def _text(file: BinaryIO, path: str, text_key: str) -> Iterator[str | BadRecord]:
    data = file.read()
    try:
        yield Document(data.decode("utf-8-sig"), 1, 0)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield BadRecord(path, f"line {line}", "is not UTF-8", _raw(data[error.start :]))


def _json_lines(file: BinaryIO, path: str, text_key: str) -> Iterator[str | BadRecord]:
    byte = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            text = _parsed(line, path, f"line {number}", text_key)
            yield text if isinstance(text, BadRecord) else Document(text, number, byte)
        byte += len(line)


def _parsed(line: bytes, path: str, where: str, text_key: str) -> str | BadRecord:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return BadRecord(path, where, "is not UTF-8", _raw(line))
    except (json.JSONDecodeError, RecursionError) as error:
        return BadRecord(path, where, f"is not JSON ({error})", _raw(line))
    return _text_of(record, path, where, text_key)


def _text_of(record: Any, path: str, where: str, text_key: str) -> str | BadRecord:
    """The text of a decoded record, or what is wrong with it."""
    if not isinstance(record, dict):
        reason = f"is a {type(record).__name__}, not an object with the key {text_key!r}"
    elif text_key not in record:
        hint = did_you_mean(text_key, record)
        reason = f"has no key {text_key!r} (it has {', '.join(map(repr, list(record)[:8]))})"
        reason += f" - set text_key; {hint}" if hint else " - set text_key"
    elif not isinstance(text := record[text_key], str):
        reason = f"{text_key!r} is a {type(text).__name__}, not a text"
    elif not is_unicode(text):
        reason = f"{text_key!r} holds half a surrogate pair, which is no character"
    else:
        return text
    return BadRecord(path, where, reason, _raw(repr(record).encode(errors="replace")))


def is_unicode(text: str) -> bool:
    """Whether a text has a UTF-8 form; JSON escapes can spell half a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(file: BinaryIO, path: str, text_key: str) -> Iterator[str | BadRecord]:
    """A `.json` file is an array of records, one record, or one record a line."""
    data = file.read()
    lines = data.lstrip(b"\xef\xbb\xbf \t\r\n").splitlines()
    if not lines:
        return
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError):
        one_a_line = False
    else:
        one_a_line = not lines[0].startswith(b"[")
    if one_a_line:
        yield from _json_lines(io.BytesIO(data), path, text_key)
        return
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", data.count(b"\n", 0, getattr(error, "start", 0)) + 1)
        raw = _raw(data.splitlines()[line - 1]) if line <= len(data.splitlines()) else ""
        yield BadRecord(path, f"line {line}", f"is not JSON ({error})", raw)
        return
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield _text_of(record, path, f"record {number}", text_key)


def _parquet(file: BinaryIO, path: str, text_key: str) -> Iterator[str | BadRecord]:
    source = io.BytesIO(file.read()) if compression_of(path) else file
    table = pyarrow.parquet.ParquetFile(source)
    names = table.schema_arrow.names
    if text_key not in names:
        hint = did_you_mean(text_key, names)
        raise DataError(
            f"{path} - has no column {text_key!r}, only {', '.join(map(repr, names))} - set "
            f"text_key{'; ' + hint if hint else ''}"
        )
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
        for text in batch.column(0).to_pylist():
            row += 1
            if isinstance(text, str):
                yield text
            else:
                yield _text_of({text_key: text}, path, f"row {row}", text_key)


def _raw(data: bytes) -> str:
    return data[:_RAW_LENGTH].decode("utf-8", errors="backslashreplace").rstrip("\r\n")
