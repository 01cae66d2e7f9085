"""Files that hold documents: finding them, and what their names say.

Everything here takes a local path or any URL that `fsspec` knows. A local path is only a path: `?`,
`#` and `::` have no meaning in it, and a file that exists under its literal name is that file, also
where the name holds `*`, `[` or `{`.
"""

import glob
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import fsspec
from fsspec.utils import infer_compression

from ostro.core.errors import DataError
from ostro.core.redaction import location_fault, with_secrets
from ostro.core.units import expand_braces
from ostro.data.cache.identity import Stamp, combined, hash_of, sampled_hash, stamp_of
from ostro.runtime.garbage import no_collections

FORMATS = ("text", "jsonl", "json", "parquet")
_BY_SUFFIX = {
    "jsonl": "jsonl", "jsonlines": "jsonl", "ndjson": "jsonl", "jl": "jsonl",
    "json": "json", "parquet": "parquet",
}  # fmt: skip
_TEXT_SUFFIXES = frozenset(
    ["txt", "text", "md", "markdown", "rst", "tex", "org", "html", "htm", "xml",
     "log", "py", "pyi", "ipynb", "c", "h", "cc", "cpp", "hpp", "cu", "java", "js", "ts", "go",
     "rs", "rb", "php", "pl", "sh", "sql", "swift", "kt", "scala", "lua", "r", "hs", "ml"]
)  # fmt: skip
_TARS = {"tar": None, "tgz": "gzip", "tbz2": "bz2", "txz": "xz", "tzst": "zstd"}
_CHECKSUMS = ("ETag", "etag", "md5Hash", "crc32c", "checksum")
_MAX_SHOWN = 20


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


class LocalFile(NamedTuple):
    """A file of this machine, and its stamp when it was listed."""

    path: str
    stamp: Stamp


class Shard(NamedTuple):
    """One file (or one part of a data set): the unit in which a source is listed and read.

    There may be very many: a named tuple is made in a fifth of a frozen dataclass's time.
    """

    name: str
    size: int  # stored bytes; 0 where unknown
    fingerprint: str = ""  # depends on the content, not on place or time; "": that of `files`
    format: str = "text"  # how to read it; a data set's own name of the split
    files: tuple[LocalFile, ...] = ()  # whose content it is, where they are local
    is_set: bool = False  # of any number of files, whose fingerprints are combined

    @property
    def stamps(self) -> tuple[Stamp, ...]:
        return tuple(file.stamp for file in self.files)

    def hash_files(self, *, sampled: bool = False) -> str:
        """The fingerprint of its files as they are now; `sampled`: as earlier versions made it."""
        assert self.files, "a shard without local files has a fingerprint of its own"
        try:
            prints = [hash_of(file.path, sampled=sampled) for file in self.files]
        except OSError as error:
            raise Unreachable(f"{self.name} - cannot be read: {reason(error)}") from error
        return combined(prints) if self.is_set else prints[0]


def find_files(patterns: Sequence[str], setting: str) -> list[str]:
    """Expand braces, then globs, in the order given; every mistake in one `DataError`."""
    return list(_find(patterns, setting))


@no_collections()
def list_files(patterns: Sequence[str], setting: str, format: str = "auto") -> list[Shard]:
    """The files that patterns stand for; a format other than `auto` is that of all."""
    found = _find(patterns, setting).items()
    return [_shard(path, guess_format(path, format), about) for path, about in found]


_About = os.stat_result | Mapping[str, Any]
"""What a listing says of a file: local, or behind a URL."""


def _find(patterns: Sequence[str], setting: str) -> dict[str, _About]:
    found: dict[str, _About] = {}
    wrong: list[str] = []
    for pattern in patterns:
        try:
            urls = _expanded(pattern)
        except ValueError as error:
            wrong.append(f"{pattern}: {error}")
            continue
        for url in urls:
            try:
                matches = _matches(url)
            except (OSError, ImportError, ValueError) as error:
                wrong.append(f"{url}: {reason(error)}")
                continue
            if not matches:
                what = "the pattern matches no file" if _is_pattern(url) else "no such file"
                wrong.append(f"{url}: {what}")
            for path, about in matches:
                if path in found:
                    wrong.append(f"{path}: listed twice")
                found[path] = about
    wrong += _twins(found)
    if wrong:
        listing = "\n".join(f"  {line}" for line in wrong[:_MAX_SHOWN])
        more = f"\n  and {len(wrong) - _MAX_SHOWN} more" if len(wrong) > _MAX_SHOWN else ""
        raise Unreachable(
            f"{setting} - {len(wrong)} of its files cannot be used - correct the path, make the "
            f"file, or take it off the list:\n{listing}{more}"
        )
    return found


def _twins(found: Mapping[str, _About]) -> list[str]:
    """What is wrong where two paths are the same file; empty ones may be."""
    local = {
        path: (about.st_dev, about.st_ino)
        for path, about in found.items()
        if isinstance(about, os.stat_result) and about.st_size
    }
    if len(set(local.values())) == len(local):
        return []
    first: dict[tuple[int, int], str] = {}
    return [
        f"{path}: listed twice, it is the same file as {first[file]}"
        for path, file in local.items()
        if first.setdefault(file, path) != path
    ]


def _is_pattern(url: str) -> bool:
    return any(c in url for c in "*?[")


def _expanded(pattern: str) -> list[str]:
    """The braces of a pattern expanded, but not those in names that exist."""
    if not is_local(pattern):
        return expand_braces(pattern)
    path = plain_path(pattern)
    literal, rest = _existing(path)
    return [path] if not rest else [literal + name for name in expand_braces(rest)]


def _existing(path: str) -> tuple[str, str]:
    """Split behind the folders (or the whole) that exist under their literal names."""
    if os.path.lexists(path):
        return path, ""
    parts = path.split("/")
    count = 0
    while count < len(parts) - 1 and os.path.lexists("/".join(parts[: count + 1]) or "/"):
        count += 1
    literal = "".join(f"{part}/" for part in parts[:count])
    return literal, path[len(literal) :]


def _matches(url: str) -> list[tuple[str, _About]]:
    return _remote_matches(url) if is_url(url) else _local_matches(url)


def _local_matches(path: str) -> list[tuple[str, _About]]:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise ValueError("a link to a file that does not exist") from None
        literal, rest = _existing(path)
        found = []
        for name in sorted(glob.glob(glob.escape(literal) + rest, recursive=True)):
            status = os.stat(name)
            if stat.S_ISREG(status.st_mode):
                found.append((name, status))
        return found
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"is a folder; name its files, for example {path.rstrip('/')}/*.txt")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    return [(path, status)]


def _remote_matches(url: str) -> list[tuple[str, _About]]:
    system, path = located(url)
    if _is_pattern(path) and not system.exists(path):
        found = system.glob(path, detail=True)
        return [
            (system.unstrip_protocol(name), info)
            for name, info in sorted(found.items())
            if info.get("type") == "file"
        ]
    if system.isdir(path):
        raise ValueError(f"is a folder; name its files, for example {url.rstrip('/')}/*.jsonl")
    return [(url, system.info(path))] if system.exists(path) else []


def located(url: str) -> tuple[Any, str]:
    """The file system and the path in it that a URL names, credentials filled in."""
    return fsspec.core.url_to_fs(with_secrets(url))


def is_local(url: str) -> bool:
    """Whether a path lies in this machine's own file system."""
    filled = with_secrets(url)
    return "://" not in filled or filled.startswith("file://")


def is_url(path: str) -> bool:
    """Whether a path that was found is behind a URL; a local one is final, whatever `$` it has."""
    if "://" in path or "${" not in path:
        return "://" in path
    return location_fault(path) is None and not is_local(path)


def plain_path(url: str) -> str:
    """The path that a local path or `file://` URL names."""
    return os.path.expanduser(with_secrets(url).removeprefix("file://"))


def reason(error: BaseException) -> str:
    """What went wrong, in words for a message."""
    if isinstance(error, OSError) and error.strerror:
        at = f" ({error.filename})" if isinstance(error, FileNotFoundError) else ""
        return f"{error.strerror}{at}"
    return f"{error}".strip() or type(error).__name__


def _name_in(url: str) -> str:
    """The file's own name, in lower case: of a chain its first part, of a URL without the query."""
    if ("://" in url or "${" in url) and is_url(url):
        url = next((part for part in url.split("::") if "://" in part), url)
        is_web = url.startswith(("http://", "https://"))
        url = re.sub(r"[?#].*" if is_web else r"\?[^?/]*=.*", "", url)
    return url.rpartition("/")[2].lower()


class _Kind(NamedTuple):
    """What a file's suffixes say."""

    suffix: str  # below compression and archive
    compression: str | None
    archive: str | None


def _kind(path: str) -> _Kind:
    return _kind_of(_name_in(path).partition(".")[2])


@lru_cache(maxsize=1024)
def _kind_of(suffixes: str) -> _Kind:
    rest = suffixes.split(".")[-3:]
    compression = archive = None
    if rest[-1] in _TARS:
        compression, archive = _TARS[rest.pop()], "tar"
        return _Kind(rest[-1] if rest else "", compression, archive)
    if rest[-1] in ("zst", "zstd"):
        compression = "zstd"
    elif rest[-1] != "zip":
        compression = infer_compression(f"x.{rest[-1]}")
    if compression:
        rest.pop()
    if rest and rest[-1] in ("tar", "zip"):
        archive = rest.pop()
    return _Kind(rest[-1] if rest else "", compression, archive)


def compression_of(path: str) -> str | None:
    """`gzip`, `zstd`, ... by the file's name, or None."""
    return _kind(path).compression


def archive_of(path: str) -> str | None:
    """`zip` or `tar` where the name is that of an archive of files, packed or not."""
    return _kind(path).archive


def known_format(path: str) -> str | None:
    """The format of a file by its name, below any compression, or None."""
    return _format_of(_kind(path).suffix)


def _format_of(suffix: str) -> str | None:
    return "text" if suffix in _TEXT_SUFFIXES else _BY_SUFFIX.get(suffix)


def guess_format(path: str, given: str = "auto") -> str:
    """The format of a file by its name, unless one is given; `auto` for an archive of files."""
    if given != "auto":
        return given
    kind = _kind(path)
    return given if kind.archive else _format_of(kind.suffix) or _refuse(path, path)


def member_format(archive: str, member: str, given: str) -> str:
    """The format of a file in an archive: one that is given, by its name, or by the archive's."""
    if archive_of(member):
        raise DataError(
            f"{archive} - holds the archive {member}, and archives in archives are not read - "
            "unpack it"
        )
    known, suffix = known_format(member), _kind(member).suffix
    if known is None and (not suffix or suffix.isdigit()):
        known = known_format(archive)
    return given if given != "auto" else known or _refuse(member, f"{archive}, {member}")


def _refuse(path: str, shown: str) -> str:
    suffix = _kind(path).suffix
    what = f"files ending in .{suffix}" if suffix else "a file without a suffix"
    more = ""
    if suffix in ("csv", "tsv"):
        more = "; tables are not read: convert it to JSON lines or parquet to train on a column"
    raise DataError(
        f"{shown} - nothing is known about {what} - set format to one of"
        f" {', '.join(FORMATS)} (text: each file is one document, as it stands){more}"
    )


def make_shard(path: str, format: str) -> Shard:
    """Describe a file that exists."""
    try:
        if not is_url(path):
            return _shard(path, format, os.stat(path))
        system, inner = located(path)
        return _shard(path, format, system.info(inner))
    except (OSError, ImportError) as error:
        raise Unreachable(f"{path} - cannot be opened: {reason(error)}") from error


def _shard(path: str, format: str, about: _About) -> Shard:
    if isinstance(about, os.stat_result):
        return Shard(path, about.st_size, "", format, (LocalFile(path, stamp_of(about)),))
    size = int(about.get("size") or 0)
    for key in _CHECKSUMS:
        if about.get(key):
            return Shard(path, size, f"{key}:{about[key]}", format)
    try:
        system, inner = located(path)
        with system.open(inner, "rb") as file:
            return Shard(path, size, sampled_hash(file, size), format)
    except (OSError, ImportError) as error:
        raise Unreachable(f"{path} - cannot be opened: {reason(error)}") from error


def is_unicode(text: str) -> bool:
    """Whether a text has a UTF-8 form; JSON escapes can spell half a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
