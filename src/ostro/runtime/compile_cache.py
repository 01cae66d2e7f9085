"""Compiled code on disk: the kernels of `ostro.kernels`, and what torch.compile keeps.

Loading such a file runs it. So the folder, `$OSTRO_CACHE_HOME/compiled`, and every file in it must
belong to this user or root, and nobody else may write there; a file's name ends with the checksum
of its content, so that one that a power loss has cut off is noticed and made again:

    kernels-<what it is made of>-<checksum>.so

A file is checked through the descriptor that it is then loaded from: what stands under its name may
have been replaced meanwhile.
"""

import atexit
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

log = logging.getLogger("ostro")

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_DIGITS = 32
_PATIENCE = 600  # seconds to wait for another process that makes the same file


def code_folder() -> Path:
    """The folder for compiled code; one of this process's own where that one cannot be used."""
    home = os.environ.get("OSTRO_CACHE_HOME") or "~/.cache/ostro"
    return _code_folder(Path(home).expanduser().absolute() / "compiled")


@cache
def _code_folder(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        with _opened(folder, os.O_DIRECTORY), tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        own = Path(_temporary_folder())
        log.warning(
            "%s is not used for compiled code: %s - compiling into a temporary folder at every"
            " start; set OSTRO_CACHE_HOME to a folder that only you can write to",
            *(folder, error.strerror or error),
        )
        return own


@cache
def unusable_cache() -> str | None:
    """Which folder torch.compile cannot write to, and why; None where it can.

    torch makes some of them when it is imported in full, and fails where it cannot, compiled or
    not: in this process the variable then names a temporary folder. Call it before.
    """
    fault = None
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        folder = os.environ.get(name)
        try:
            if folder:
                os.makedirs(folder, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    continue
            os.environ.pop(name, None)  # empty is none
        except OSError as error:
            fault = f"{name} = {folder} cannot be written to ({error.strerror})"
            os.environ[name] = _temporary_folder()
    return fault


def _temporary_folder() -> str:
    """A folder that nobody else can write to, until this process ends."""
    folder = tempfile.mkdtemp(prefix="ostro-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def compiled_file(name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """An intact file of this name, to be loaded inside; `make` writes it at a path if need be.

    One process makes it, others wait. Raises `OSError` where no file can be kept.
    """
    folder = code_folder()
    with _opened(folder, os.O_DIRECTORY) as directory:
        file = _intact(directory, folder, name)
        if file is None:
            with _alone(directory, name):
                file = _intact(directory, folder, name)
                if file is None:
                    _make(directory, folder, name, make)
                    file = _intact(directory, folder, name)
        if file is None:
            raise OSError(f"{folder} does not keep what is written there")
        try:
            yield Path(f"/proc/self/fd/{file}")
        finally:
            os.close(file)


@contextmanager
def _opened(path: Path | str, flags: int, directory: int | None = None) -> Iterator[int]:
    """A descriptor of what only this user, or root, can have written."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags, dir_fd=directory)
    try:
        status = os.fstat(file)
        if status.st_uid not in (os.geteuid(), 0):
            raise PermissionError(0, f"it belongs to another user ({status.st_uid})")
        if status.st_mode & _OTHERS_WRITE:
            raise PermissionError(0, "other users can write to it (chmod go-w)")
        yield file
    finally:
        os.close(file)


def _intact(directory: int, folder: Path, name: str) -> int | None:
    """A descriptor of the file; what is damaged or not ours is deleted."""
    for entry in sorted(os.listdir(directory)):
        match = re.fullmatch(rf"{re.escape(name)}-([\da-f]{{{_DIGITS}}})\.so", entry)
        if match is None:
            continue
        try:
            with _opened(entry, os.O_NOFOLLOW, directory) as file:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise OSError(0, "it is no file")
                if _checksum(file) == match[1]:
                    return os.dup(file)
                raise OSError(0, "it is damaged")
        except FileNotFoundError:  # another process has replaced it
            continue
        except OSError as error:
            log.warning("%s/%s is compiled again: %s", folder, entry, error.strerror or error)
            with suppress(OSError):
                os.unlink(entry, dir_fd=directory)
    return None


def _checksum(file: int) -> str:
    with open(os.dup(file), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:_DIGITS]


def _make(directory: int, folder: Path, name: str, make: Callable[[Path], None]) -> None:
    """Put the file in place, whole and on the disk, or not at all."""
    scratch = f"building-{name}-"
    for left in os.listdir(directory):  # by a process that was killed
        if left.startswith(scratch):
            shutil.rmtree(folder / left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=scratch, dir=folder) as place:
        made = Path(place, "made.so")
        make(made)
        made.chmod(0o600)
        with _opened(f"{Path(place).name}/made.so", os.O_NOFOLLOW, directory) as file:
            os.fsync(file)
            target = f"{name}-{_checksum(file)}.so"
        source = f"{Path(place).name}/made.so"
        os.rename(source, target, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)


@contextmanager
def _alone(directory: int, name: str) -> Iterator[None]:
    """Hold a file's name against other processes, where the file system has locks."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    lock = os.open(f"{name}.lock", flags, 0o600, dir_fd=directory)
    try:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # no locks there: each makes its own, and the last one stands
                break
        yield
    finally:
        os.close(lock)
