"""Folders on this machine or behind any fsspec URL, with the few operations a checkpoint needs.

Locally a folder is put in place by one rename. An object store has no rename: there
`metadata.json`, uploaded last, is what makes a folder a checkpoint.
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ostro.core.errors import CheckpointError
from ostro.core.redaction import with_secrets
from ostro.core.units import format_bytes
from ostro.io.retry import Result, patiently

MARKER = "metadata.json"
STEP = re.compile(r"step-\d+")
"""What the folder of a checkpoint is called."""
PARTIAL = ".tmp-"  # a folder being written or deleted: never a checkpoint
ASIDE = ".old-"  # a complete checkpoint being replaced by another of the same step
NEW = ".new-"  # on an object store: what will replace another, found once its marker is there
BEGUN = "uploading.json"
"""On an object store: beside the files of a checkpoint whose marker has not been uploaded yet."""
_AT_ONCE = 64  # requests to an object store


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path in it that a path or URL names."""
    try:
        return fsspec.url_to_fs(with_secrets(url), **_options(url))
    except (ValueError, ImportError, OSError) as error:
        raise CheckpointError(f"{url} - cannot be opened: {error}") from error


def _options(url: str) -> dict[str, Any]:
    """Retrying is up to us, and a server that hangs is noticed; unless the user has set that."""
    scheme = url.partition("://")[0]
    if scheme not in ("s3", "s3a") or "config_kwargs" in fsspec.config.conf.get(scheme, {}):
        return {}
    limits = {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 0}}
    return {"config_kwargs": limits}


def call(url: str, work: Callable[[], Result], patience: float | None = None) -> Result:
    """What `work` returns; made again where a store, not a local disk, fails for the moment."""
    return work() if is_local(url) else patiently(url, work, patience)


def is_local(url: str) -> bool:
    """Whether a path or URL is on this machine's file system."""
    return isinstance(locate(url)[0], LocalFileSystem)


def is_folder(url: str) -> bool:
    """Whether there is a folder; an object store has one where a file lies below the name."""
    fs, path = locate(url)
    fs.invalidate_cache()  # another rank or machine may have written there
    return bool(call(url, lambda: fs.isdir(path)))


@dataclass
class Tree:
    """What a look at or below a folder found."""

    markers: list[tuple[str, bytes | OSError]] = field(default_factory=list)
    """Folders that hold a `metadata.json`, and what that holds."""
    unmarked: list[str] = field(default_factory=list)
    """Folders called `step-<k>` that hold files, but none of that name."""
    files: list[str] = field(default_factory=list)
    """Files in other folders whose names were asked for; local ones only."""


def look(url: str, wanted: re.Pattern[str] = re.compile(r"(?!)")) -> Tree:
    """Read every marker at or below `url`; paths in the answer start with it.

    Follows symbolic links, visits no folder twice, and looks for nothing inside a checkpoint.
    """
    fs, path = locate(url)
    return _look_here(url, path, wanted) if isinstance(fs, LocalFileSystem) else _look_there(url)


def _look_here(url: str, path: str, wanted: re.Pattern[str]) -> Tree:
    tree, seen, ahead = Tree(), set(), [("", path)]
    while ahead:
        below, folder = ahead.pop()
        shown = f"{url.rstrip('/')}/{below}" if below else url
        try:
            about = os.stat(folder)
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            tree.markers.append((shown, _read(f"{folder}/{MARKER}")))
            continue
        except (FileNotFoundError, NotADirectoryError):
            pass  # not a checkpoint
        except OSError as error:
            tree.markers.append((shown, error))
            continue
        with contextlib.suppress(OSError), os.scandir(folder) as found:
            entries = list(found)
            folders = [e.name for e in entries if e.is_dir() and not e.name.startswith(PARTIAL)]
            ahead += [(f"{below}/{n}" if below else n, f"{folder}/{n}") for n in folders]
            tree.files += [
                f"{shown}/{e.name}" for e in entries if wanted.fullmatch(e.name) and e.is_file()
            ]
            if STEP.fullmatch(folder.rpartition("/")[2]) and len(folders) < len(entries):
                tree.unmarked.append(shown)
    return tree


def _read(path: str) -> bytes:
    if not stat.S_ISREG(os.lstat(path).st_mode):  # a pipe would be waited for
        raise OSError("is no regular file")
    with open(path, "rb") as file:
        return file.read()


def _look_there(url: str) -> Tree:
    """One listing, then many markers at a time: each answer of a store takes its while."""
    fs, root = locate(url)
    fs.invalidate_cache()  # another machine may have written there
    root = root.rstrip("/")
    try:
        files = call(url, lambda: fs.find(root))
    except FileNotFoundError:
        return Tree()
    folders: dict[str, set[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        if not folder.rpartition("/")[2].startswith(PARTIAL):
            folders.setdefault(folder, set()).add(name)
    shown = {folder: url.rstrip("/") + folder[len(root) :] for folder in folders}
    marked = [folder for folder, names in sorted(folders.items()) if MARKER in names]
    steps = [f for f in sorted(folders) if STEP.fullmatch(f.rpartition("/")[2])]

    def read(folder: str) -> bytes | OSError:
        try:
            return call(shown[folder], lambda: fs.cat_file(f"{folder}/{MARKER}"))
        except OSError as error:
            return error

    with ThreadPoolExecutor(_AT_ONCE, "markers") as pool:
        contents = list(zip(marked, pool.map(read, marked), strict=True))
    return Tree(
        [(shown[f], data) for f, data in contents if not isinstance(data, FileNotFoundError)],
        [shown[f] for f in steps if not folders[f] & {MARKER, BEGUN}],
    )


def names(url: str) -> list[str]:
    """The names directly in a folder; empty where there is none."""
    fs, path = locate(url)
    fs.invalidate_cache()
    try:
        found = call(url, lambda: fs.ls(path, detail=False))
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def size(url: str) -> int:
    """The bytes of a file, or of all files in a folder."""
    fs, path = locate(url)
    return int(call(url, lambda: fs.du(path)))


def remove(url: str, patience: float | None = None) -> None:
    """Delete a file, or a folder so that it is no checkpoint before any of its files goes."""
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        remove_file(f"{url}/{MARKER}", patience)
        with contextlib.suppress(FileNotFoundError):
            call(url, lambda: fs.rm(path, recursive=True), patience)
        return
    if not os.path.isdir(path):
        os.unlink(path)
        return
    parent, name = os.path.split(path)
    if not name.startswith(PARTIAL):
        doomed = os.path.join(parent, f"{PARTIAL}deleted-{name}-{os.getpid()}")
        os.rename(path, doomed)
        path = doomed
    shutil.rmtree(path)


def remove_file(url: str, patience: float | None = None) -> None:
    """Delete a file on an object store, if it is there."""
    fs, path = locate(url)
    with contextlib.suppress(FileNotFoundError):
        call(url, lambda: fs.rm_file(path), patience)


def move(source: str, target: str) -> None:
    """Put a checkpoint in the place of another: locally by a rename, where none may be.

    An object store copies. What is replaced stops being a checkpoint first, and `source` stops
    last: at any moment one of both is complete.
    """
    fs, path = locate(source)
    if isinstance(fs, LocalFileSystem):
        os.rename(path, locate(target)[1])
        flush_folder(os.path.dirname(target))
        return
    to = locate(target)[1]
    new = [name for name in names(source) if name != BEGUN]
    old = set(names(target))
    remove_file(f"{target}/{MARKER}")
    for name in sorted(new, key=lambda name: name == MARKER):
        call(target, lambda name=name: fs.cp_file(f"{path}/{name}", f"{to}/{name}"))
    for name in old - set(new):
        remove_file(f"{target}/{name}")
    remove(source)


def abort_uploads(url: str, is_ours: Callable[[str], bool]) -> None:
    """Give up what dead processes uploaded of files in folders of these names, where a store
    keeps such parts, invisible and for ever."""
    fs, path = locate(url)
    if not hasattr(fs, "list_multipart_uploads"):
        return
    bucket, prefix, _ = fs.split_path(path)
    for upload in call(url, lambda: fs.list_multipart_uploads(bucket)):
        key = upload["Key"]
        folder, _, _ = key.removeprefix(f"{prefix}/").rpartition("/")
        if key.startswith(f"{prefix}/") and is_ours(folder):
            with contextlib.suppress(FileNotFoundError):
                call(url, lambda key=key, i=upload["UploadId"]: fs.abort_mpu(bucket, key, i))


def start_flush(file: Any, start: int, length: int) -> None:
    """Let the disk begin with what was written there to a local file, before all of it is flushed.

    Linux writes these pages out and forgets those that are clean: a checkpoint is not read soon.
    """
    with contextlib.suppress(OSError, AttributeError):  # no such call, or no file of this machine
        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def flush_folder(url: str) -> None:
    """Make the names in a local folder durable; a store needs no such thing."""
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_space(url: str, need: int) -> None:
    """Raise a `CheckpointError` where the disk below `url` has less than `need` bytes free."""
    if not is_local(url):
        return
    path = locate(url)[1]
    while not os.path.exists(path):
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    if free < need:
        raise CheckpointError(
            f"{url} - a checkpoint needs {format_bytes(need)} ({need} bytes) and the disk has "
            f"{format_bytes(free)} free - free some space or point checkpointer.base_path "
            "at another disk; nothing was written and older checkpoints are untouched"
        )
