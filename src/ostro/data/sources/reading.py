"""Reading files of documents: opened, unpacked, and cut into records.

A file that cannot be read to its end is a `DataError` that names it; a record that cannot be used
is a `BadRecord`, and the caller decides what happens with it. An archive of files is read whole: a
`.zip` by the names of its members, a `.tar` in its own order.
"""

import io
import json
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet
from fsspec.compression import compr

from ostro.core.errors import DataError, did_you_mean
from ostro.data.cache.identity import ContentHash
from ostro.data.sources.files import (
    BadRecord,
    Document,
    Unreachable,
    archive_of,
    compression_of,
    is_unicode,
    is_url,
    located,
    member_format,
    reason,
)
from ostro.data.sources.long_text import LONG, LongText

_Record = str | LongText | BadRecord
Records = Generator[_Record, None, str | None]
"""Documents and bad records; returns the fingerprint of the bytes that were read, if known."""

_RAW_LENGTH = 200
_BUFFER = 1 << 18
_BOMB_RATIO, _BOMB_FREE = 1000, 64 << 20
_JSON_NAMES = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number",
    str: "a string", list: "an array", dict: "an object",
}  # fmt: skip


def read_file(path: str, format: str, text_key: str) -> Records:
    """The documents of a file in order; a damaged file is a `DataError`."""
    try:
        with _stored(path) as stored:
            yield from _read(stored, path, format, text_key)
            return stored.fingerprint()
    except (OSError, ImportError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise _damaged(path, error) from error
        raise Unreachable(f"{path} - cannot be opened: {reason(error)}") from error
    except DataError:
        raise
    except Exception as error:  # what is compressed or parquet, and damaged, raises almost anything
        raise _damaged(path, error) from error


def _damaged(path: str, error: BaseException) -> DataError:
    return DataError(
        f"{path} - cannot be read to its end: {reason(error)} - the file is damaged or cut off; "
        "fetch or make it again, or take it off the list"
    )


class _Stored(io.RawIOBase):
    """A file's stored bytes, hashed as they pass by where they are on this machine."""

    def __init__(self, file: Any, size: int, content: ContentHash | None):
        self._file, self.size, self._content = file, size, content
        self._fingerprint: str | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        if self._content is not None:
            self._content.update(data)
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        data = self._file.read()
        if self._content is not None:
            self._content.update(data)
        return data

    def at_will(self) -> Any:
        """The file itself, to be read here and there; it is hashed first."""
        if self.fingerprint() is not None:
            self._file.seek(0)
        return self._file

    def fingerprint(self) -> str | None:
        """That of the whole file, of which what is left is read."""
        if self._content is not None and self._fingerprint is None:
            while data := self._file.read(1 << 20):
                self._content.update(data)
            self._fingerprint = self._content.fingerprint()
        return self._fingerprint


@contextmanager
def _stored(path: str) -> Iterator[_Stored]:
    if not is_url(path):
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            yield _Stored(file, size, ContentHash(size))
    else:
        system, inner = located(path)
        with system.open(inner, "rb") as file:
            yield _Stored(file, system.size(inner) or 0, None)


class _Bounded(io.RawIOBase):
    """Decompressed bytes, up to a limit: a small file can hold gigabytes of nothing."""

    def __init__(self, stream: Any, size: int):
        self._stream, self._limit = stream, max(_BOMB_FREE, _BOMB_RATIO * size)
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self.count += len(data)
        if self.count > self._limit:
            raise ValueError(f"it holds more than {_BOMB_RATIO} times its own size")
        buffer[: len(data)] = data
        return len(data)


def _unpacked(stream: Any, compression: str | None, size: int) -> _Bounded:
    """A stream of `size` stored bytes without its compression."""
    if compression in ("gzip", "zstd"):  # several frames too; notices truncation
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), compression)
    elif compression:
        stream = cast(dict[str, Any], compr)[compression](stream, mode="rb")
    return _Bounded(stream, size)


def _read(stored: _Stored, path: str, format: str, text_key: str) -> Iterator[_Record]:
    compression, archive = compression_of(path), archive_of(path)
    if archive == "tar":
        stream = _unpacked(stored, compression, stored.size)
        yield from _tar(stream, path, format, text_key)
    elif compression:
        file = io.BufferedReader(_unpacked(stored, compression, stored.size), _BUFFER)
        if archive:
            yield from _zip(io.BytesIO(file.read()), path, format, text_key, stored.size)
        else:
            yield from READERS[format](file, path, text_key)
    elif archive:
        yield from _zip(stored.at_will(), path, format, text_key, stored.size)
    elif format == "parquet":
        yield from _parquet(stored.at_will(), path, text_key)
    else:
        yield from READERS[format](io.BufferedReader(stored, _BUFFER), path, text_key)


def _zip(file: Any, path: str, format: str, text_key: str, size: int) -> Iterator[_Record]:
    with zipfile.ZipFile(file) as archive:
        members = [m for m in archive.infolist() if not m.is_dir() and not _is_litter(m.filename)]
        members.sort(key=lambda member: member.filename)
        formats = [member_format(path, member.filename, format) for member in members]
        if any(member.flag_bits & 1 for member in members):
            raise DataError(f"{path} - is encrypted - unpack it")
        for member, own in zip(members, formats, strict=True):
            with archive.open(member) as stream:
                yield from _member(stream, path, member.filename, own, text_key, size)
        _require_members(path, len(members))


def _tar(stream: _Bounded, path: str, format: str, text_key: str) -> Iterator[_Record]:
    count = 0
    with tarfile.open(fileobj=cast(Any, stream), mode="r|") as archive:
        for member in archive:
            if member.isfile() and not _is_litter(member.name):
                own = member_format(path, member.name, format)
                inner = archive.extractfile(member)
                assert inner is not None, "it is a file"
                yield from _member(inner, path, member.name, own, text_key, member.size)
                count += 1
        end = archive.offset
    while stream.read(1 << 20):
        pass
    if stream.count < end + tarfile.BLOCKSIZE:  # blocks of zeros close an archive
        raise ValueError("its end is missing")
    _require_members(path, count)


def _require_members(path: str, count: int) -> None:
    if not count:
        raise DataError(f"{path} - the archive holds no files - take it off the list")


def _is_litter(name: str) -> bool:
    """What file managers leave in archives."""
    return name.startswith("__MACOSX/") or name.rpartition("/")[2].startswith(".")


def _member(
    stream: Any, path: str, name: str, format: str, text_key: str, size: int
) -> Iterator[_Record]:
    unpacked = io.BufferedReader(_unpacked(stream, compression_of(name), size), _BUFFER)
    for record in READERS[format](unpacked, path, text_key):
        if isinstance(record, BadRecord):
            yield replace(record, where=f"{name}, {record.where}")
        elif isinstance(record, LongText):
            yield replace(record, byte=None)
        else:  # numbered through the archive: a line of a member is no line of the file
            yield str(record)


def _text(file: BinaryIO, path: str, text_key: str) -> Iterator[_Record]:
    data = file.read()
    try:
        is_long = len(data) > LONG
        yield LongText(data) if is_long else Document(data.decode("utf-8-sig"), 1, 0)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield BadRecord(
            path, f"line {line}", "is not UTF-8", _raw(data[error.start : error.end + _RAW_LENGTH])
        )


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
    except (ValueError, RecursionError) as error:
        problem = _why_not_json(error)
        if path.endswith(".jl") and isinstance(error, json.JSONDecodeError):
            problem += "; .jl is taken for JSON lines - for programs in Julia set format: text"
        return BadRecord(path, where, problem, _raw(line))
    return text_of(record, path, where, text_key)


def _why_not_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8"
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return f"is not JSON ({error})"
    return f"holds a number of more than {sys.get_int_max_str_digits():,} digits"


def text_of(record: Any, path: str, where: str, text_key: str) -> str | BadRecord:
    """The text of a decoded record, or what is wrong with it."""
    if not isinstance(record, dict):
        problem = f"is {_kind(record)}, not an object with the key {text_key!r}"
    elif text_key not in record:
        hint = did_you_mean(text_key, record)
        problem = f"has no key {text_key!r} (it has {', '.join(map(repr, list(record)[:8]))})"
        problem += f" - set text_key; {hint}" if hint else " - set text_key"
    elif not isinstance(text := record[text_key], str):
        problem = f"{text_key!r} is {_kind(text)}, not a text"
    elif not is_unicode(text):
        problem = f"{text_key!r} holds half a surrogate pair, which is no character"
    else:
        return text
    return BadRecord(path, where, problem, _raw(_shown(record).encode(errors="replace")))


def _kind(value: Any) -> str:
    """A value's type in JSON's words."""
    return _JSON_NAMES.get(type(value), f"a {type(value).__name__}")


def _shown(record: Any) -> str:
    try:
        return repr(record)
    except ValueError:  # a number too long to be written
        return ""


def _json(file: BinaryIO, path: str, text_key: str) -> Iterator[str | BadRecord]:
    """A `.json` file is an array of records, one record, or one record a line."""
    data = file.read()
    lines = data.lstrip(b"\xef\xbb\xbf \t\r\n").splitlines()
    if not lines:
        return
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError) as error:
        # A number too long is one in a whole record: the others stand in lines of their own.
        one_a_line = type(error) is ValueError and lines[0].startswith(b"{")
    else:
        one_a_line = not lines[0].startswith(b"[")
    if one_a_line:
        yield from _json_lines(io.BytesIO(data), path, text_key)
        return
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        line = _line_of(error, data)
        raw = _raw(data.splitlines()[line - 1]) if line <= len(data.splitlines()) else ""
        yield BadRecord(path, f"line {line}", _why_not_json(error), raw)
        return
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield text_of(record, path, f"record {number}", text_key)


def _line_of(error: Exception, data: bytes) -> int:
    if isinstance(error, json.JSONDecodeError):
        return error.lineno
    start = error.start if isinstance(error, UnicodeDecodeError) else 0
    if type(error) is ValueError:
        number = re.search(rb"\d{%d}" % (sys.get_int_max_str_digits() + 1), data)
        start = number.start() if number else 0
    return data.count(b"\n", 0, start) + 1


def _parquet(file: Any, path: str, text_key: str) -> Iterator[str | BadRecord]:
    source = file if file.seekable() else io.BytesIO(file.read())
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
                yield text_of({text_key: text}, path, f"row {row}", text_key)


def _raw(data: bytes) -> str:
    return data[:_RAW_LENGTH].decode("utf-8", errors="backslashreplace").rstrip("\r\n")


READERS: dict[str, Callable[[Any, str, str], Iterator[_Record]]] = {
    "text": _text,
    "jsonl": _json_lines,
    "json": _json,
    "parquet": _parquet,
}
