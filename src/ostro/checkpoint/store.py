"""Writing and reading one checkpoint folder.

    step-1000/
      model.safetensors  optimizer.safetensors  state.safetensors   one per group of tensors
      model-00000-of-00004.safetensors ...  shards.json             where ranks hold parts of it
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
import re
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import time
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank

from ostro.checkpoint import storage
from ostro.checkpoint.metadata import SHARDS, FileRecord, Metadata, parse_metadata
from ostro.checkpoint.pieces import Piece, Stored, whole
from ostro.checkpoint.sharded import SUFFIX, Index, save_shares
from ostro.checkpoint.tensorfile import file_size, read_tensors, tensor_pieces
from ostro.errors import CheckpointError
from ostro.phases import mark
from ostro.shapes import FILE_NAME, read_object

_VALUES = "values.json"
STEP = re.compile(r"step-\d+")
"""What the folder of a checkpoint is called."""
_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")
_UNHASHED = 4  # pieces of a file that may be written before their checksum is made


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


def _small_files(state: State, index: Index) -> dict[str, bytes]:
    for name in state.texts:
        assert FILE_NAME.fullmatch(name) and not name.endswith(SUFFIX), name
        assert name not in (_VALUES, SHARDS, storage.MARKER), name
    files = {_VALUES: (json.dumps(state.values, indent=2) + "\n").encode()}
    if index:
        files[SHARDS] = json.dumps(index).encode()
    return files | {name: text.encode() for name, text in state.texts.items()}


def checkpoint_bytes(state: State) -> int:
    """Size in bytes of the checkpoint of `state`, without writing it.

    Tensors count by shape and type alone and may be on the meta device. Exact up to the few
    bytes by which the run's name and the time change the length of `metadata.json`.
    """
    sizes = {name: len(data) for name, data in _small_files(state, {}).items()}
    sizes |= {group + SUFFIX: file_size(named) for group, named in state.tensors.items()}
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
    group: ProcessGroup | None = None,
    make_room: Callable[[int, int], None] = lambda need, step: None,
) -> Metadata | None:
    """Write `state` as `<folder>/step-<step>`, replacing a checkpoint of that name safely.

    `folder` is a path or an fsspec URL. With a `group` of processes all its ranks call this, and
    each writes the shards it holds. `make_room(need, step)` is called on the first one before so
    many bytes are written. Returns the metadata written, on the first rank.

    Raises `CheckpointError`, on all ranks, where the disk is too small (before writing), fills up,
    or refuses; what was being written is removed then, and every older checkpoint is still there.
    """
    timestamp = time() if timestamp is None else float(timestamp)
    marks = Metadata(step, timestamp, is_temporary, is_best, run_id, run_name, {})
    save = _Save(folder, state, group, marks, make_room)
    try:
        if group is None:
            work = save.begin()
            parts = {part + SUFFIX: named for part, named in state.tensors.items()}
            works = [partial(save.write_file, f"{work}/{n}", t) for n, t in parts.items()]
            save.commit(dict(zip(parts, _at_once(works), strict=True)), {})
        else:
            save_shares(state.tensors, group, save.begin, save.write_file, save.commit)
    except BaseException:
        save.undo()
        raise
    return save.metadata


class _Save:
    """One checkpoint being written. The first rank begins, commits, and cleans up."""

    def __init__(
        self,
        folder: str,
        state: State,
        group: ProcessGroup | None,
        marks: Metadata,
        make_room: Callable[[int, int], None],
    ):
        self.metadata: Metadata | None = None  # of what was committed
        self._folder, self._state, self._marks, self._make_room = folder, state, marks, make_room
        self._is_local = storage.is_local(folder)
        self._is_alone = group is None
        self._target = step_folder(folder, marks.step)
        self._work = self._aside = ""  # not begun

    def begin(self) -> str:
        """Make the folder that is written to."""
        with self._explained():
            need, ready = checkpoint_bytes(self._state), self._state.folders.values()
            room = need + sum(storage.size(str(path)) for path in ready)
            self._make_room(room, self._marks.step)
            storage.require_space(self._folder, need)
            name = self._target.rpartition("/")[2]
            self._aside = f"{self._folder.rstrip('/')}/{storage.ASIDE}{name}-{os.getpid()}"
            # A store has no rename, and needs none where nothing is replaced: the marker is last.
            is_direct = not self._is_local and not storage.is_folder(self._target)
            partial = self._aside.replace(storage.ASIDE, storage.PARTIAL)
            self._work = self._target if is_direct else partial
            fs, path = storage.locate(self._work)
            if fs.isdir(path):
                fs.rm(path, recursive=True)
            fs.makedirs(path, exist_ok=True)
            return self._work

    def write_file(self, url: str, content: bytes | Mapping[str, Tensor]) -> FileRecord:
        """Write one file into that folder, on any rank."""
        with self._explained():
            parent = url.rpartition("/")[0]
            if self._is_local and not self._is_alone and not storage.is_folder(parent):
                raise OSError(f"{parent}, made by the first rank, is not there: share one disk")
            return _write_file(url, content)

    def commit(self, files: dict[str, FileRecord], index: Index) -> None:
        """Write what is no tensor, then make the folder a checkpoint."""
        work, state = self._work, self._state
        with self._explained():
            for name, ready in state.folders.items():
                # on this machine, and on the same disk
                os.rename(ready, f"{storage.locate(work)[1]}/{name}")
            for name, data in _small_files(state, index).items():
                files[name] = self.write_file(f"{work}/{name}", data)
            metadata = replace(self._marks, files=files)
            mark("commit")
            self.write_file(f"{work}/{storage.MARKER}", metadata.to_json().encode())
            if work != self._target:
                storage.flush_folder(work)
                if storage.is_folder(self._target):
                    storage.move(self._target, self._aside)
                mark("commit")
                storage.move(work, self._target)  # the commit
        mark("commit")
        self.metadata = metadata
        with contextlib.suppress(OSError):  # committed all the same; the next attempt tidies up
            if storage.is_folder(self._aside):
                storage.remove(self._aside)

    def undo(self) -> None:
        """Remove what was begun, and put back what it was to replace."""
        if not self._work or self.metadata is not None:
            return
        with contextlib.suppress(OSError):  # the first error matters; the next save tidies up
            if storage.is_folder(self._work):
                storage.remove(self._work)
            if storage.is_folder(self._aside) and not storage.is_folder(self._target):
                storage.move(self._aside, self._target)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what could not be written; the error has to be one that travels between ranks."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            if self._is_alone and self._is_local and not isinstance(error, OSError):
                raise  # a mistake of ours
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else f"cannot be written: {error}"
            where = "" if self._is_alone else f"rank {get_rank()}: "
            advice = "older checkpoints are untouched; free space or change base_path"
            raise CheckpointError(f"{self._target} - {where}{what} - {advice}") from error


def _at_once(works: Sequence[Callable[[], FileRecord]]) -> list[FileRecord]:
    """What each returns, all done at the same time; an error comes out when all have ended."""
    futures: list[Future[FileRecord]] = [Future() for _ in works]

    def carry_out(work: Callable[[], FileRecord], future: Future[FileRecord]) -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # Daemons, as a disk that hangs must not keep a process that crashes.
    pairs = zip(works, futures, strict=True)
    threads = [threading.Thread(target=carry_out, args=pair, daemon=True) for pair in pairs]
    for thread in threads[1:]:
        thread.start()
    for thread in threads[:1]:
        thread.run()
    wait(futures)
    return [future.result() for future in futures]


def _write_file(url: str, content: bytes | Mapping[str, Tensor]) -> FileRecord:
    """Write one file, flushed to the disk, and say what was written."""
    fs, path = storage.locate(url)
    digest, size = hashlib.sha256(), 0
    pieces = [content] if isinstance(content, bytes) else tensor_pieces(content)
    hashed: deque[Future[None]] = deque()
    # The checksum takes as long as writing: another thread makes it meanwhile.
    with ThreadPoolExecutor(1, "checksum") as hasher, fs.open(path, "wb") as file:
        for piece in pieces:
            mark("save")
            hashed.append(hasher.submit(digest.update, piece))
            file.write(piece)
            storage.start_flush(file, size, len(piece))
            size += len(piece)
            if len(hashed) > _UNHASHED:
                hashed.popleft().result()
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
        self._opened: dict[str, dict[str, Tensor]] = {}  # file name -> tensors, mapped
        small = [name for name in metadata.files if not name.endswith(SUFFIX)]
        contents = {name: self._read(name) for name in small}
        shards = contents.pop(SHARDS, b"{}")
        self._shards: Index = read_object(shards, f"{path}/{SHARDS}", CheckpointError)
        if _VALUES not in contents:
            raise CheckpointError(f"{path}/{_VALUES} - is missing from the list of files")
        values = contents.pop(_VALUES)
        self.values = read_object(values, f"{path}/{_VALUES}", CheckpointError)
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
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            where = f"{self.path}/{SHARDS}"
            raise CheckpointError(f"{where} - is damaged: {group!r} in it is {error!r}") from error

    def _in_pieces(self, name: str, files: list[str], shape: list[int], pieces: list) -> Stored:
        found = []
        for number, offset, size in pieces:
            read = partial(self._read_piece, files[number], name, torch.Size(size))
            found.append(Piece(torch.Size(offset), torch.Size(size), read))
            box = zip(offset, size, shape, strict=True)
            if any(o < 0 or n < 0 or o + n > end for o, n, end in box):
                raise ValueError(f"a part of {name} that lies outside of it")
        areas = [piece.size.numel() for piece in found]
        if not found or sum(areas) != torch.Size(shape).numel():
            raise ValueError(f"parts of {name} that are not all of it")
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
        data = fs.cat_file(f"{root}/{storage.MARKER}")
    except (FileNotFoundError, NotADirectoryError):
        there = storage.is_folder(path)
        what = f"has no {storage.MARKER}: it is not a complete checkpoint" if there else "not found"
        raise CheckpointError(f"{path} - {what}") from None
    except OSError as error:
        raise CheckpointError(f"{marker} - cannot be read: {error}") from error
    metadata = parse_metadata(data, marker)
    fs.invalidate_cache()  # another rank or machine may have written there
    sizes = {e["name"].rpartition("/")[2]: e["size"] for e in fs.ls(root, detail=True)}
    for name, record in metadata.files.items():
        size = sizes.get(name)
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
