"""Writing and reading one checkpoint folder.

    step-1000/
      model.safetensors  optimizer.safetensors  state.safetensors   one per group of tensors
      values.json                                                   step, position, tracker ids ...
      config.yaml                                                   texts
      deepspeed/                                                    folders that a backend wrote
      metadata.json                                                 written last: the commit marker

A local folder is written under another name, flushed, and renamed into place, so a crash or a
full disk at any moment leaves the checkpoints that were there. Nothing is pickled but
what DeepSpeed puts into its folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from torch import Tensor

from ostro.checkpoint import storage
from ostro.checkpoint.metadata import FileRecord, Metadata, is_plain_name, parse_metadata, read_json
from ostro.checkpoint.tensorfile import file_size, read_tensors, tensor_pieces
from ostro.errors import CheckpointError

_VALUES = "values.json"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on as if it had not stopped."""

    tensors: Mapping[str, Mapping[str, Tensor]]  # group, which is one file, to name to tensor
    values: Mapping[str, Any] = field(default_factory=dict)  # what JSON can hold
    texts: Mapping[str, str] = field(default_factory=dict)  # file name to content
    folders: Mapping[str, Path] = field(default_factory=dict)  # name to a folder to be moved in


def step_folder(folder: str, step: int) -> str:
    """Where the checkpoint of `step` lies below a run's folder."""
    return f"{folder.rstrip('/')}/step-{step}"


def _small_files(values: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, bytes]:
    for name in texts:
        assert is_plain_name(name) and not name.endswith(_SUFFIX), name
        assert name not in (_VALUES, storage.MARKER), name
    files = {_VALUES: (json.dumps(values, indent=2) + "\n").encode()}
    return files | {name: text.encode() for name, text in texts.items()}


def checkpoint_bytes(state: State) -> int:
    """Size in bytes of the checkpoint of `state`, without writing it.

    Tensors count by shape and type alone and may be on the meta device. Exact up to the few
    bytes by which the run's name and the time change the length of `metadata.json`.
    """
    sizes = {name: len(data) for name, data in _small_files(state.values, state.texts).items()}
    sizes |= {group + _SUFFIX: file_size(named) for group, named in state.tensors.items()}
    records = {name: FileRecord(size, "0" * 64) for name, size in sizes.items()}
    marker = Metadata(10**6, 1e9, False, False, "run-id00", "run-id00", records).to_json()
    return sum(sizes.values()) + len(marker)


def write(
    folder: str,
    state: State,
    *,
    step: int,
    is_temporary: bool,
    is_best: bool = False,
    run_id: str = "",
    run_name: str = "",
    timestamp: float | None = None,
) -> Metadata:
    """Write `state` as `<folder>/step-<step>`, replacing a checkpoint of that name safely.

    `folder` is a path or an fsspec URL. Returns the metadata written. Raises `CheckpointError`
    where the disk is too small (before writing), fills up, or refuses; what was being written
    is removed then, and every older checkpoint is still there.
    """
    storage.require_space(folder, checkpoint_bytes(state))
    local, target = storage.is_local(folder), step_folder(folder, step)
    aside = f"{folder.rstrip('/')}/{storage.ASIDE}step-{step}-{os.getpid()}"
    # A store has no rename, and needs none where nothing is replaced: the marker comes last.
    direct = not local and not storage.is_folder(target)
    work = target if direct else aside.replace(storage.ASIDE, storage.PARTIAL)
    marks = (step, time() if timestamp is None else float(timestamp), is_temporary, is_best)
    try:
        metadata = Metadata(*marks, run_id, run_name, _write_files(work, state))
        _write_file(f"{work}/{storage.MARKER}", metadata.to_json().encode())
        if not direct:
            storage.flush_folder(work)
            if storage.is_folder(target):
                storage.move(target, aside)
            storage.move(work, target)  # the commit
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error matters; the next save tidies up
            if storage.is_folder(work):
                storage.remove(work)
            if storage.is_folder(aside) and not storage.is_folder(target):
                storage.move(aside, target)
        if isinstance(error, OSError) or (isinstance(error, Exception) and not local):
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else f"cannot be written: {error}"
            advice = "older checkpoints are untouched; free space or change base_path"
            raise CheckpointError(f"{target} - {what} - {advice}") from error
        raise
    with contextlib.suppress(OSError):  # committed all the same; the next attempt tidies up
        if storage.is_folder(aside):
            storage.remove(aside)
    return metadata


def _write_files(folder: str, state: State) -> dict[str, FileRecord]:
    fs, path = storage.locate(folder)
    if fs.isdir(path):
        fs.rm(path, recursive=True)
    fs.makedirs(path, exist_ok=True)
    contents: dict[str, bytes | Mapping[str, Tensor]] = {
        group + _SUFFIX: named for group, named in state.tensors.items()
    }
    contents |= _small_files(state.values, state.texts)
    for name, ready in state.folders.items():
        os.rename(ready, f"{path}/{name}")  # on this machine, and on the same disk
    return {name: _write_file(f"{folder}/{name}", content) for name, content in contents.items()}


def _write_file(url: str, content: bytes | Mapping[str, Tensor]) -> FileRecord:
    """Write one file, flushed to the disk, and say what was written."""
    fs, path = storage.locate(url)
    digest, size = hashlib.sha256(), 0
    with fs.open(path, "wb") as file:
        for piece in [content] if isinstance(content, bytes) else tensor_pieces(content):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        if storage.is_local(url):
            file.flush()
            os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


class Saved:
    """A complete checkpoint that was opened: metadata and small files; tensors on request."""

    def __init__(self, path: str, metadata: Metadata):
        self.path = path
        self.metadata = metadata
        self._verified: dict[str, str] = {}  # file name -> local path
        self._downloads: str | None = None
        small = [name for name in metadata.files if not name.endswith(_SUFFIX)]
        contents = {name: self._read(name) for name in small}
        if _VALUES not in contents:
            raise CheckpointError(f"{path}/{_VALUES} - is missing from the list of files")
        self.values: dict[str, Any] = read_json(contents.pop(_VALUES), f"{path}/{_VALUES}")
        self.texts = {name: data.decode(errors="replace") for name, data in contents.items()}

    def __str__(self) -> str:
        return self.path

    @property
    def step(self) -> int:
        """0-based index of the last update."""
        return self.metadata.step

    @property
    def groups(self) -> list[str]:
        """The groups of tensors that it holds."""
        return [n.removesuffix(_SUFFIX) for n in self.metadata.files if n.endswith(_SUFFIX)]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU, after their file's checksum was compared."""
        name = group + _SUFFIX
        if name not in self.metadata.files:
            found = ", ".join(self.groups) or "none"
            raise CheckpointError(f"{self.path} - holds no {group!r} tensors, only {found}")
        return read_tensors(self._verified_file(name), f"{self.path}/{name}")

    def verify(self) -> None:
        """Compare every file with its checksum; `CheckpointError` names the first that differs."""
        for name in self.metadata.files:
            self._verified_file(name)

    def _read(self, name: str) -> bytes:
        with open(self._verified_file(name), "rb") as file:
            return file.read()

    def _verified_file(self, name: str) -> str:
        """The local path of a file whose content is as recorded; a remote one is fetched once."""
        if name in self._verified:
            return self._verified[name]
        url = f"{self.path}/{name}"
        fs, path = storage.locate(url)
        try:
            if not storage.is_local(url):
                if self._downloads is None:
                    self._downloads = tempfile.mkdtemp(prefix="ostro-checkpoint-")
                    weakref.finalize(self, shutil.rmtree, self._downloads, ignore_errors=True)
                remote, path = path, os.path.join(self._downloads, name)
                fs.get_file(remote, path)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{url} - cannot be read: {error}") from error
        if digest != self.metadata.files[name].sha256:
            raise CheckpointError(f"{url} - is damaged: its content differs from its checksum")
        self._verified[name] = path
        return path


def read_metadata(path: str) -> Metadata:
    """The metadata of a checkpoint folder, after its files' sizes were compared with it."""
    fs, root = storage.locate(path)
    marker = f"{path}/{storage.MARKER}"
    try:
        data = fs.cat_file(f"{root}/{storage.MARKER}")
    except (FileNotFoundError, NotADirectoryError):
        there = storage.is_folder(path)
        what = f"has no {storage.MARKER}: it is not a complete checkpoint" if there else "not found"
        raise CheckpointError(f"{path} - {what}") from None
    except OSError as error:
        raise CheckpointError(f"{marker} - cannot be read: {error}") from error
    metadata = parse_metadata(data, marker)
    for name, record in metadata.files.items():
        size = fs.size(f"{root}/{name}") if fs.isfile(f"{root}/{name}") else None
        if size is None:
            raise CheckpointError(f"{path}/{name} - is missing from the checkpoint")
        if size != record.bytes:
            fault = f"it has {size} bytes instead of {record.bytes}"
            raise CheckpointError(f"{path}/{name} - is damaged: {fault}")
    return metadata


def load(path: str) -> Saved:
    """Open the checkpoint in a folder (a path or an fsspec URL).

    Sizes and small files are checked here, tensors by checksum when they are asked for. Every
    way in which a folder is not a checkpoint is a `CheckpointError` naming file and fault.
    """
    path = path.rstrip("/") or path
    return Saved(path, read_metadata(path))
