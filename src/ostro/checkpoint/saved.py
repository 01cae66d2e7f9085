"""Reading one checkpoint folder, which `store` wrote: every file is held against its checksum."""

import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ostro.checkpoint.metadata import SHARDS, VALUES, Metadata, parse_metadata
from ostro.checkpoint.pieces import Piece, Stored, whole
from ostro.checkpoint.sharded import SUFFIX, Index
from ostro.checkpoint.tiling import tiles
from ostro.core.errors import CheckpointError
from ostro.io import filesystem
from ostro.io.downloads import Downloads
from ostro.io.json_schema import matches_schema, read_object
from ostro.io.safetensors import read_tensors

WEIGHTS = "model"
"""The group of tensors that generation and evaluation need."""
_FETCHES = 2
_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")


class Saved:
    """A checkpoint that was opened: metadata and small files; tensors on request.

    `faults`: files that are missing or cut short, and what is wrong with them. None of them
    belongs to the weights.
    """

    def __init__(self, path: str, metadata: Metadata, faults: Mapping[str, str] | None = None):
        self.path = path
        self.metadata = metadata
        self._faults = {group_of(name): fault for name, fault in (faults or {}).items()}
        self._verified: dict[str, str] = {}  # file name -> local path
        self._downloads: Downloads | None = None
        self._opened: dict[str, dict[str, Tensor]] = {}  # file name -> tensors, mapped
        small = [name for name in metadata.files if not name.endswith(SUFFIX)]
        contents = {name: self._read(name) for name in small}
        shards = contents.pop(SHARDS, b"{}")
        self._shards: Index = read_object(shards, f"{path}/{SHARDS}", CheckpointError)
        if VALUES not in contents:
            raise CheckpointError(f"{path}/{VALUES} - is missing from the list of files")
        values = contents.pop(VALUES)
        self.values = read_object(values, f"{path}/{VALUES}", CheckpointError)
        self.texts = {name: data.decode(errors="replace") for name, data in contents.items()}

    def __str__(self) -> str:
        return self.path

    @property
    def step(self) -> int:
        """0-based index of the last update."""
        return self.metadata.step

    @property
    def lacks(self) -> str:
        """Why a run cannot resume from it, empty if it can: it holds the weights in any case."""
        if self._faults:
            return next(iter(self._faults.values()))
        is_whole = "optimizer" in self.groups or bool(self.values.get("deepspeed"))
        return "" if is_whole else f"{self.path} - holds no optimizer state"

    @property
    def groups(self) -> list[str]:
        """The groups of tensors that it holds."""
        return [group for group in self._tensor_files if group not in self._faults]

    @property
    def _tensor_files(self) -> dict[str, list[str]]:
        """The files of every group."""
        files: dict[str, list[str]] = {}
        for name in sorted(self.metadata.files):
            if name.endswith(SUFFIX):
                files.setdefault(group_of(name), []).append(name)
        return files

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU, after their files' checksums were compared."""
        return {name: stored.full() for name, stored in self.stored(group).items()}

    def stored(self, group: str) -> dict[str, Stored]:
        """The tensors of one group, not read yet; files are compared when they are read."""
        if group in self._faults:
            raise CheckpointError(self._faults[group])
        files = self._tensor_files.get(group, [])
        if not files:
            found = ", ".join(self.groups) or "none"
            raise CheckpointError(f"{self.path} - holds no {group!r} tensors, only {found}")
        if files == [group + SUFFIX]:
            return whole(self._open(files[0]))
        try:
            return {
                name: self._in_pieces(name, files, **entry)
                for name, entry in self._shards[group].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = f"{self.path}/{SHARDS}"
            raise CheckpointError(f"{where} - is damaged: {group!r} in it is {error!r}") from error

    def _in_pieces(self, name: str, files: list[str], shape: list[int], pieces: list) -> Stored:
        if not matches_schema([shape, pieces], ([int], [(int, [int], [int])])):
            raise ValueError(f"a part of {name} that is not described by whole numbers")
        dims = {len(shape), *(len(part) for _, *box in pieces for part in box)}
        if len(dims) > 1 or not 0 <= max(shape, default=0) < 1 << 62:
            raise ValueError(f"a part of {name} with other dimensions")
        if not tiles(shape, [(offset, size) for _, offset, size in pieces]):
            raise ValueError(f"parts of {name} that are not all of it, each place once")
        found = []
        for number, offset, size in pieces:
            if not 0 <= number < len(files):
                raise ValueError(f"a part of {name} in file {number} of {len(files)}")
            read = partial(self._read_piece, files[number], name, torch.Size(size))
            found.append(Piece(torch.Size(offset), torch.Size(size), read))
        return Stored(torch.Size(shape), found)

    def _read_piece(self, file: str, name: str, size: torch.Size) -> Tensor:
        tensor = self._open(file).get(name)
        if tensor is None or tensor.shape != size:
            raise CheckpointError(f"{self.path}/{file} - is damaged: it holds no {name} of {size}")
        return tensor

    def _open(self, file: str) -> dict[str, Tensor]:
        if file not in self._opened:
            path = self._verified_file(file)
            self._opened[file] = read_tensors(path, f"{self.path}/{file}")
        return self._opened[file]

    def verify(self, rank: int = 0, num_ranks: int = 1, groups: Sequence[str] = ()) -> None:
        """Compare every file with its checksum; `CheckpointError` names the first that differs.

        Each of several ranks takes its share: the files it wrote, where their number is the same.
        `groups`: compare only these groups of tensors.
        """
        for group, files in self._tensor_files.items():  # others were compared when they were read
            if not groups or group in groups:
                for file in files[rank::num_ranks]:
                    self._verified_file(file)

    def _read(self, name: str) -> bytes:
        return Path(self._verified_file(name)).read_bytes()

    def _verified_file(self, name: str) -> str:
        """The local path of a file whose content is as recorded; a remote one is fetched once."""
        if name in self._verified:
            return self._verified[name]
        url = f"{self.path}/{name}"
        is_local = filesystem.is_local(url)
        try:
            # What went wrong on the way is not wrong over there.
            for _ in range(1 if is_local else _FETCHES):
                path = filesystem.locate(url)[1] if is_local else self._fetched(name, url)
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest == self.metadata.files[name].sha256:
                    self._verified[name] = path
                    return path
        except OSError as error:
            raise CheckpointError(f"{url} - cannot be read: {error}") from error
        raise CheckpointError(f"{url} - is damaged: its content differs from its checksum")

    def _fetched(self, name: str, url: str) -> str:
        fs, remote = filesystem.locate(url)
        if self._downloads is None:
            self._downloads = Downloads()
        path = f"{self._downloads.folder}/{name}"
        filesystem.call(url, lambda: fs.get_file(remote, path))
        return path


def group_of(file: str) -> str:
    """The group whose tensors a file holds; a file of another kind is a group of its own."""
    return _NUMBER.sub("", file.removesuffix(SUFFIX)) if file.endswith(SUFFIX) else file


def read_metadata(path: str) -> Metadata:
    """The metadata of a checkpoint folder, after its files' sizes were compared with it."""
    metadata = _read_marker(path)
    for fault in _faults(path, metadata).values():
        raise CheckpointError(fault)
    return metadata


def _read_marker(path: str) -> Metadata:
    fs, root = filesystem.locate(path)
    marker = f"{path}/{filesystem.MARKER}"
    try:
        if filesystem.is_local(path):
            _require_plain(os.lstat(f"{root}/{filesystem.MARKER}").st_mode, marker)
        data = filesystem.call(path, lambda: fs.cat_file(f"{root}/{filesystem.MARKER}"))
    except (FileNotFoundError, NotADirectoryError):
        there = filesystem.is_folder(path)
        what = (
            f"has no {filesystem.MARKER}: it is not a complete checkpoint" if there else "not found"
        )
        raise CheckpointError(f"{path} - {what}") from None
    except OSError as error:
        raise CheckpointError(f"{marker} - cannot be read: {error}") from error
    return parse_metadata(data, marker)


def _faults(path: str, metadata: Metadata) -> dict[str, str]:
    """The files that are missing or of another size than recorded, and what to say of each."""
    fs, root = filesystem.locate(path)
    fs.invalidate_cache()  # another rank or machine may have written there
    try:
        listed = filesystem.call(path, lambda: fs.ls(root, detail=True))
    except OSError as error:  # it may just have been deleted
        raise CheckpointError(f"{path} - cannot be read: {error}") from error
    sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed}
    found = {}
    for name, record in metadata.files.items():
        size = sizes.get(name)
        if size is None:
            found[name] = f"{path}/{name} - is missing from the checkpoint"
        elif fault := _not_plain(f"{root}/{name}", f"{path}/{name}"):
            found[name] = fault
        elif size != record.bytes:
            fault = f"it has {size} bytes instead of {record.bytes}"
            found[name] = f"{path}/{name} - is damaged: {fault}"
    return found


def _not_plain(path: str, shown: str) -> str:
    """What is wrong with a local file that is a link or no file at all, empty for others."""
    try:
        if filesystem.is_local(shown):
            _require_plain(os.lstat(path).st_mode, shown)
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def _require_plain(mode: int, where: str) -> None:
    """Refuse what leads out of the folder, never ends, or waits for somebody to write."""
    if not stat.S_ISREG(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
        advice = "copy the checkpoint with `cp -rL`, which copies what links point to"
        raise CheckpointError(f"{where} - is {what}, which is not followed - {advice}")


def load(path: str, *, weights: bool = False) -> Saved:
    """Open the checkpoint in a folder (a path or an fsspec URL).

    Sizes and small files are checked here, tensors by checksum when they are asked for. Every
    way in which a folder is not a checkpoint is a `CheckpointError` naming file and fault.
    `weights`: the other groups of tensors may be missing or cut short.
    """
    path = path.rstrip("/") or path
    metadata = _read_marker(path)
    faults = _faults(path, metadata)
    for name, fault in faults.items():
        if not weights or not name.endswith(SUFFIX) or group_of(name) == WEIGHTS:
            raise CheckpointError(fault)
    return Saved(path, metadata, faults)
