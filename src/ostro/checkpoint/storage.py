"""Folders on this machine or behind any fsspec URL, with the few operations a checkpoint needs.

Locally a folder is put in place by one rename. An object store has no rename: there
`metadata.json`, uploaded last, is what makes a folder a checkpoint.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ostro.errors import CheckpointError
from ostro.secrets import with_secrets
from ostro.units import format_bytes

MARKER = "metadata.json"
PARTIAL = ".tmp-"  # a folder being written or deleted: never a checkpoint
ASIDE = ".old-"  # a complete checkpoint being replaced by another of the same step


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path in it that a path or URL names."""
    try:
        return fsspec.url_to_fs(with_secrets(url))
    except (ValueError, ImportError, OSError) as error:
        raise CheckpointError(f"{url} - cannot be opened: {error}") from error


def is_local(url: str) -> bool:
    """Whether a path or URL is on this machine's file system."""
    return isinstance(locate(url)[0], LocalFileSystem)


def is_folder(url: str) -> bool:
    """Whether there is a folder; an object store has one where a file lies below the name."""
    fs, path = locate(url)
    fs.invalidate_cache()  # another rank or machine may have written there
    return bool(fs.isdir(path))


def below(url: str) -> Iterator[str]:
    """Every folder at or below `url` that holds a `metadata.json`, as paths that start with it.

    Follows symbolic links, visits no folder twice, and looks for nothing inside a checkpoint.
    """
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        fs.invalidate_cache()  # another machine may have written there
        with contextlib.suppress(FileNotFoundError):
            for name in fs.find(path):
                folder, _, file = name.rpartition("/")
                if file == MARKER and not folder.rpartition("/")[2].startswith(PARTIAL):
                    yield url.rstrip("/") + folder[len(path.rstrip("/")) :]
        return
    seen: set[str] = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or MARKER in files:
            folders.clear()
        else:
            folders[:] = [name for name in folders if not name.startswith(PARTIAL)]
        if real not in seen and MARKER in files:
            yield os.path.join(url, os.path.relpath(folder, path)) if folder != path else url
        seen.add(real)


def names(url: str) -> list[str]:
    """The names directly in a folder; empty where there is none."""
    fs, path = locate(url)
    fs.invalidate_cache()
    try:
        return sorted(name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def size(url: str) -> int:
    """The bytes of a file, or of all files in a folder."""
    fs, path = locate(url)
    return int(fs.du(path))


def remove(url: str) -> None:
    """Delete a folder so that it stops being a checkpoint before any of its files goes."""
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{MARKER}")
        fs.rm(path, recursive=True)
        return
    parent, name = os.path.split(path)
    if not name.startswith(PARTIAL):
        doomed = os.path.join(parent, f"{PARTIAL}deleted-{name}-{os.getpid()}")
        os.rename(path, doomed)
        path = doomed
    shutil.rmtree(path)


def move(source: str, target: str) -> None:
    """Rename a folder; an object store copies, then deletes, so that one of both is complete."""
    fs, path = locate(source)
    if isinstance(fs, LocalFileSystem):
        os.rename(path, locate(target)[1])
        flush_folder(os.path.dirname(target))
    else:
        fs.mv(path, locate(target)[1], recursive=True)


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
