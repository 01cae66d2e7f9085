"""Reading one checkpoint folder, which `store` wrote: every file is held against its checksum."""

import hashlib
import os
import re
import shutil
import stat
import tempfile
import weakref
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ostro.checkpoint import storage
from ostro.checkpoint.metadata import SHARDS, VALUES, Metadata, parse_metadata
from ostro.checkpoint.pieces import Piece, Stored, whole
from ostro.checkpoint.sharded import SUFFIX, Index
from ostro.checkpoint.tensorfile import read_tensors
from ostro.checkpoint.tiling import tiles
from ostro.errors import CheckpointError
from ostro.shapes import has_shape, read_object

_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")


class Saved:
    """A complete checkpoint that was opened: metadata and small files; tensors on request."""

    def __init__(self, path: str, metadata: Metadata):
        self.path = path
        self.metadata = metadata
        self._verified: dict[str, str] = {}  # file name -> local path
        self._downloads: str | None = None
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
    def groups(self) -> list[str]:
        """The groups of tensors that it holds."""
        return list(self._tensor_files)

    @property
    def _tensor_files(self) -> dict[str, list[str]]:
        """The files of every group."""
        files: dict[str, list[str]] = {}
        for name in sorted(self.metadata.files):
            if name.endswith(SUFFIX):
                files.setdefault(_NUMBER.sub("", name.removesuffix(SUFFIX)), []).append(name)
        return files

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU, after their files' checksums were compared."""
        return {name: stored.full() for name, stored in self.stored(group).items()}

    def stored(self, group: str) -> dict[str, Stored]:
        """The tensors of one group, not read yet; files are compared when they are read."""
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
        if not has_shape([shape, pieces], ([int], [(int, [int], [int])])):
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

    def verify(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Compare every file with its checksum; `CheckpointError` names the first that differs.

        Each of several ranks takes its share: the files it wrote, where their number is the same.
        """
        for files in self._tensor_files.values():  # the others were compared when they were read
            for file in files[rank::num_ranks]:
                self._verified_file(file)

    def _read(self, name: str) -> bytes:
        return Path(self._verified_file(name)).read_bytes()

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
        if storage.is_local(path):
            _require_plain(os.lstat(f"{root}/{storage.MARKER}").st_mode, marker)
        data = fs.cat_file(f"{root}/{storage.MARKER}")
    except (FileNotFoundError, NotADirectoryError):
        there = storage.is_folder(path)
        what = f"has no {storage.MARKER}: it is not a complete checkpoint" if there else "not found"
        raise CheckpointError(f"{path} - {what}") from None
    except OSError as error:
        raise CheckpointError(f"{marker} - cannot be read: {error}") from error
    metadata = parse_metadata(data, marker)
    fs.invalidate_cache()  # another rank or machine may have written there
    entries = {e["name"].rpartition("/")[2]: e for e in fs.ls(root, detail=True)}
    for name, record in metadata.files.items():
        if name not in entries:
            raise CheckpointError(f"{path}/{name} - is missing from the checkpoint")
        if storage.is_local(path):
            _require_plain(os.lstat(f"{root}/{name}").st_mode, f"{path}/{name}")
        size = entries[name]["size"]
        if size != record.bytes:
            fault = f"it has {size} bytes instead of {record.bytes}"
            raise CheckpointError(f"{path}/{name} - is damaged: {fault}")
    return metadata


def _require_plain(mode: int, where: str) -> None:
    """Refuse what leads out of the folder, never ends, or waits for somebody to write."""
    if not stat.S_ISREG(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
        advice = "copy the checkpoint with `cp -rL`, which copies what links point to"
        raise CheckpointError(f"{where} - is {what}, which is not followed - {advice}")


def load(path: str) -> Saved:
    """Open the checkpoint in a folder (a path or an fsspec URL).

    Sizes and small files are checked here, tensors by checksum when they are asked for. Every
    way in which a folder is not a checkpoint is a `CheckpointError` naming file and fault.
    """
    path = path.rstrip("/") or path
    return Saved(path, read_metadata(path))
