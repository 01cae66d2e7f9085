"""The token cache on disk: where it lies, what its ledger says, how its tokens are read."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ostro.core.errors import DataError
from ostro.core.redaction import redacted
from ostro.data.cache import checksums
from ostro.data.cache.identity import write_whole
from ostro.data.cache.mapped import expect_random, map_file
from ostro.data.sources.files import Unreachable, is_local, located, plain_path
from ostro.io.json_schema import FILE_NAME, read_object
from ostro.runtime.garbage import no_collections

Files = TypeVar("Files")
logger = logging.getLogger("ostro.data")

LEDGER = "ledger.json"
_OWN = re.compile(
    r"(?:tokens-\d+\.bin|documents\.bin|checksums\.bin|(?:progress|sources|quarantine)\.jsonl"
    r"|(?:ledger|tokens|tokenizer)\.json)(?:\.tmp|\.\w+\.tmp|\.copy)?"
)
"""Names of the files in a cache's folder, and of what a kill leaves of them."""
_ANY_ID = 1 << 63
_DELETE = "delete the folder"


class TokenStore:
    """A sequence of tokens in one or several memory-mapped files."""

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        names: Sequence[str] = (),
        num_ids: int | None = None,
        advice: str = "",
    ):
        """`names`: the arrays' files. `num_ids`: every id is below, or reading it is a `DataError`
        that gives this `advice`."""
        self._arrays, self._names, self._advice = list(arrays), list(names), advice
        self._starts = np.cumsum([0] + [len(array) for array in arrays]).tolist()
        self._num_ids = _ANY_ID if num_ids is None else num_ids
        self.num_tokens: int = self._starts[-1]

    @classmethod
    def open(
        cls,
        paths: Sequence[str | Path],
        dtype: str,
        num_ids: int | None = None,
        advice: str = "",
    ) -> "TokenStore":
        """Map files of little-endian ids; no file stays open."""
        kind = np.dtype(dtype).newbyteorder("<")
        full = [str(path) for path in paths if os.path.getsize(path)]
        try:
            return cls([map_file(path, kind) for path in full], full, num_ids, advice)
        except OSError as error:
            raise DataError(f"{error.filename} - cannot be mapped: {error.strerror}") from error

    def expect_random(self) -> None:
        """What follows is read here and there: in large files, nothing around it is read ahead."""
        for array in self._arrays:
            expect_random(array)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 as int64; `DataError` for an id that cannot be one."""
        assert 0 <= start <= stop <= self.num_tokens, "outside of the tokens"
        result = np.empty(stop - start, dtype=np.int64)
        at, index = start, bisect_right(self._starts, start) - 1
        while at < stop:
            first = self._starts[index]
            end = min(stop, self._starts[index + 1])
            result[at - start : end - start] = self._arrays[index][at - first : end - first]
            at, index = end, index + 1
        unsigned = result.view(np.uint64)  # in which a negative id is a large one
        if len(result) and int(unsigned.max()) >= self._num_ids:
            raise self.out_of_range(int(result[unsigned.argmax()]), start + int(unsigned.argmax()))
        return result

    def out_of_range(self, token_id: int, position: int) -> DataError:
        """What is wrong with a token, by its file and place there."""
        index = bisect_right(self._starts, position) - 1
        name = self._names[index] if self._names else "the tokens"
        return DataError(
            f"{name} - id {token_id} at token {position - self._starts[index]} is outside the "
            f"vocabulary of {self._num_ids} - {self._advice}"
        )

    def largest(self) -> tuple[int, int]:
        """The largest id (a negative one is) and where it first stands; reads everything."""
        best, position = -1, 0
        for start, array in zip(self._starts[:-1], self._arrays, strict=True):
            unsigned = array.view(f"<u{array.dtype.itemsize}")
            for first in range(0, len(array), 1 << 24):
                part = unsigned[first : first + (1 << 24)]
                index = int(part.argmax())
                if int(part[index]) > best:
                    best, position = int(part[index]), start + first + index
        return best, position


def write_json(path: Path, value: Any) -> None:
    """Write beside and move into place, durable when it returns."""
    write_whole(path, json.dumps(value).encode())  # indented, long lists of files are slow


@no_collections()
def read_json(path: Path, shape: dict[str, Any]) -> dict[str, Any] | None:
    """A JSON object of this shape, or None where there is no file."""
    try:
        return read_object(path.read_bytes(), str(path), DataError, shape, _DELETE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} - cannot be read ({error}) - {_DELETE}") from error


def fits(folder: Path, was: dict, now: dict, rebuild: bool, more: Sequence[str] = ()) -> bool:
    """Whether what a folder was built from (`was`) is what the configuration asks for (`now`).

    The content of `files` counts, not their names; where `now` has none, as they cannot be
    reached, the `places` are compared instead. `more`: differences found otherwise. False only
    with `rebuild`; otherwise a `DataError` lists what differs.
    """
    if "files" in now:
        old, new = ({k: v for k, v in key.items() if k != "places"} for key in (was, now))
        same = [f[1:] for f in was["files"]] == [f[1:] for f in now["files"]]
        old["files"], new["files"] = ("", "") if same else (was["files"], now["files"])
    else:
        old, new, rebuild = {k: v for k, v in was.items() if k != "files"}, now, False
    lines = [*_differences(old, new), *more]
    if lines and rebuild:
        logger.warning("%s does not fit the configuration and is built again", folder)
    elif lines:
        listing = "".join(f"\n  {line}" for line in lines)
        raise DataError(
            f"{folder} - does not fit the configuration: it was built from something else - set "
            f"another cache_dir, delete the folder, or set rebuild_cache: true{listing}"
        )
    return not lines


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            lines += _differences(was, now, f"{prefix}{key}.")
        elif key == "files" and not prefix:
            lines.append(f"files: {_file_differences(was, now)}")
        else:
            lines.append(f"{prefix}{key}: built with {was}, the configuration has {now}")
    return lines


def _file_differences(was: list, now: list) -> str:
    """Files are [name, size, fingerprint]."""
    old, new = {file[2]: file[0] for file in was}, {file[2]: file[0] for file in now}
    gone = [name for print_, name in old.items() if print_ not in new]
    come = [name for print_, name in new.items() if print_ not in old]
    parts = []
    for what, names in (("changed", [n for n in come if n in gone]),
                        ("removed", [n for n in gone if n not in come]),
                        ("added", [n for n in come if n not in gone])):  # fmt: skip
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{what} {', '.join(names[:3])}{more}")
    return "; ".join(parts) or "the same files in another order"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the kernel frees it when its holder dies."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s is being built by another process; waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s); build it from one process", folder, error)
        yield


def is_own(path: Path) -> bool:
    """Whether a file of a cache's folder is one that caches are made of."""
    return _OWN.fullmatch(path.name) is not None and not path.is_dir()


def _require_own(folder: Path) -> None:
    """`DataError` where a folder to be filled holds other things, such as the user's data."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    foreign = sorted(path.name for path in found if not is_own(path))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise DataError(
            f"{folder} - holds {', '.join(foreign[:3])}{more}, and the cache needs a folder of its"
            " own - set data.cache_dir to another folder"
        )


class CacheDir:
    """A cache directory: a local folder, or a URL with a local copy.

    A finished folder is recognised by its ledger, which names its files; the ledger travels
    last in both directions.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            if is_local(url):
                self.remote = None
                self.local = Path(plain_path(url))
            else:
                home = os.environ.get("OSTRO_CACHE_HOME", "~/.cache/ostro")
                name = hashlib.sha256(redacted(self.url).encode()).hexdigest()[:16]
                self.local = Path(home).expanduser() / name
                self.remote, self._root = located(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise DataError(f"cache_dir = {url} - cannot be used: {error}") from error

    def finished(
        self,
        name: str,
        shape: dict[str, Any],
        list_files: Callable[[], Files],
        fits: Callable[[Path, dict[str, Any], Files | None], bool],
        make: Callable[[Path, Files], None],
        must_exist: bool,
    ) -> tuple[Path, dict[str, Any]]:
        """The finished folder of that name and its ledger of a shape, made now if need be.

        `list_files` says what it is made from. A folder that `fits` stands as it is, also where
        those files are `Unreachable`; else `make` fills it and writes the ledger, alone in there.
        """
        folder = self.fetch(name)
        ledger = read_json(folder / LEDGER, shape)
        if ledger is None and must_exist:
            raise DataError(
                f"{folder} - holds no finished cache - make it with `ostro cache` and the"
                " same configuration, or correct data.cache_dir"
            )
        try:
            files = list_files()
        except Unreachable as error:
            if ledger is None or not fits(folder, ledger, None):
                raise
            logger.warning("%s: using the finished cache without its files: %s", name, error)
            return folder, ledger
        if ledger is not None and fits(folder, ledger, files):
            return folder, ledger
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _require_own(folder)
            with locked(folder):
                ledger = read_json(folder / LEDGER, shape)  # another process may have finished it
                if ledger is None or not fits(folder, ledger, files):
                    (folder / LEDGER).unlink(missing_ok=True)
                    make(folder, files)
                    self.publish(name)
        except OSError as error:
            what = f"the cache cannot be written: {error.strerror or error}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what = "the disk is full - make room or set cache_dir to another disk; what was"
                what += " built is kept and the next start goes on from there"
            raise DataError(f"{folder} - {what}") from error
        ledger = read_json(folder / LEDGER, shape)
        assert ledger is not None, "it was written"
        return folder, ledger

    def fetch(self, name: str) -> Path:
        """The local folder of that name; a finished remote one is copied there first."""
        folder = self.local / name
        if self.remote is None:
            return folder
        path = f"{self._root}/{name}"
        try:
            if not self.remote.exists(f"{path}/{LEDGER}"):
                return folder
            text = self.remote.cat_file(f"{path}/{LEDGER}")
            where, shape = f"{self.url}/{name}/{LEDGER}", {"stored": [FILE_NAME]}
            ledger = read_object(text, where, DataError, shape, _DELETE)
            if (folder / LEDGER).exists() and (folder / LEDGER).read_bytes() == text:
                return folder
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                if (folder / LEDGER).exists() and (folder / LEDGER).read_bytes() == text:
                    return folder  # another process has copied it
                logger.info("copying %s/%s to %s", self.url, name, folder)
                (folder / LEDGER).unlink(missing_ok=True)
                for file in ledger["stored"]:
                    # Beside, then into place: another run may have the old one mapped.
                    copy = folder / f"{file}.copy"
                    self.remote.get_file(f"{path}/{file}", str(copy))
                    os.replace(copy, folder / file)
                checksums.verify(folder, ledger, whole=True)
                write_whole(folder / LEDGER, text)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.url}/{name} - cannot be copied: {error}") from error
        return folder

    def publish(self, name: str) -> None:
        """Copy a finished local folder to where the URL points."""
        if self.remote is None:
            return
        folder, path = self.local / name, f"{self._root}/{name}"
        try:
            self.remote.makedirs(path, exist_ok=True)
            for file in [*json.loads((folder / LEDGER).read_text())["stored"], LEDGER]:
                self.remote.put_file(str(folder / file), f"{path}/{file}")
        except OSError as error:
            raise DataError(f"{self.url}/{name} - cannot be written: {error}") from error
