"""Writing one checkpoint folder; `saved` reads it.

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
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import time
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank

from ostro.checkpoint.metadata import SHARDS, VALUES, FileRecord, Metadata
from ostro.checkpoint.sharded import SUFFIX, Index, save_shares
from ostro.core.errors import CheckpointError
from ostro.io import filesystem
from ostro.io.json_schema import FILE_NAME
from ostro.io.safetensors import file_size, tensor_pieces
from ostro.runtime.phase import enter_phase

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
        assert name not in (VALUES, SHARDS, filesystem.MARKER), name
    files = {VALUES: (json.dumps(state.values, indent=2) + "\n").encode()}
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


@contextlib.contextmanager
def _opened(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[Any]:
    """A file to write. What fails is given up: closing it would upload the part that is there."""
    file = fs.open(path, "wb")
    try:
        yield file
        file.close()
    except BaseException as error:
        had_parts = getattr(file, "mpu", None) is not None
        if isinstance(file, AbstractBufferedFile):
            with contextlib.suppress(Exception):
                file.discard()
            file.closed = True
        else:
            file.close()
        if had_parts and isinstance(error, FileNotFoundError):  # the answer to "complete" was lost
            raise ConnectionError(f"an upload in parts is gone: {error}") from error
        raise


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
        self._is_local = filesystem.is_local(folder)
        self._is_alone = group is None
        self._target = step_folder(folder, marks.step)
        self._work = self._aside = ""  # not begun
        self._is_whole = False

    def begin(self) -> str:
        """Make the folder that is written to."""
        with self._explained():
            need, ready = checkpoint_bytes(self._state), self._state.folders.values()
            room = need + sum(filesystem.size(str(path)) for path in ready)
            self._make_room(room, self._marks.step)
            filesystem.require_space(self._folder, need)
            name = self._target.rpartition("/")[2]
            self._aside = f"{self._folder.rstrip('/')}/{filesystem.ASIDE}{name}-{os.getpid()}"
            # A store has no rename, and needs none where nothing is replaced: the marker is last.
            is_direct = not self._is_local and not filesystem.is_folder(self._target)
            kind = filesystem.PARTIAL if self._is_local else filesystem.NEW
            partial = self._aside.replace(filesystem.ASIDE, kind)
            self._work = self._target if is_direct else partial
            if filesystem.is_folder(self._work):
                filesystem.remove(self._work)
            fs, path = filesystem.locate(self._work)
            filesystem.call(self._work, lambda: fs.makedirs(path, exist_ok=True))
            if not self._is_local:
                _write_file(f"{self._work}/{filesystem.BEGUN}", b"{}\n")
            return self._work

    def write_file(self, url: str, content: bytes | Mapping[str, Tensor]) -> FileRecord:
        """Write one file into that folder, on any rank."""
        with self._explained():
            parent = url.rpartition("/")[0]
            if self._is_local and not self._is_alone and not filesystem.is_folder(parent):
                raise OSError(f"{parent}, made by the first rank, is not there: share one disk")
            return _write_file(url, content)

    def commit(self, files: dict[str, FileRecord], index: Index) -> None:
        """Write what is no tensor, then make the folder a checkpoint."""
        work, state = self._work, self._state
        with self._explained():
            for name, ready in state.folders.items():
                # on this machine, and on the same disk
                os.rename(ready, f"{filesystem.locate(work)[1]}/{name}")
            for name, data in _small_files(state, index).items():
                files[name] = self.write_file(f"{work}/{name}", data)
            metadata = replace(self._marks, files=files)
            enter_phase("commit")
            self.write_file(f"{work}/{filesystem.MARKER}", metadata.to_json().encode())
            self._is_whole = not self._is_local  # found from now on, wherever it is
            if work != self._target:
                filesystem.flush_folder(work)
                if self._is_local and filesystem.is_folder(self._target):
                    filesystem.move(self._target, self._aside)
                enter_phase("commit")
                filesystem.move(work, self._target)  # the commit
        enter_phase("commit")
        self.metadata = metadata
        with contextlib.suppress(OSError, CheckpointError):  # committed; the next one tidies up
            if not self._is_local:
                filesystem.remove_file(f"{self._target}/{filesystem.BEGUN}", patience=5)
            elif filesystem.is_folder(self._aside):
                filesystem.remove(self._aside)

    def undo(self) -> None:
        """Remove what was begun, and put back what it was to replace."""
        if not self._work or self._is_whole or self.metadata is not None:
            return
        # The first error matters; the next save tidies up.
        with contextlib.suppress(OSError, CheckpointError):
            if not self._is_local:
                filesystem.remove(self._work, patience=5)
                return
            if filesystem.is_folder(self._work):
                filesystem.remove(self._work)
            if filesystem.is_folder(self._aside) and not filesystem.is_folder(self._target):
                filesystem.move(self._aside, self._target)

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
    return filesystem.call(url, lambda: _write_once(url, content))


def _write_once(url: str, content: bytes | Mapping[str, Tensor]) -> FileRecord:
    fs, path = filesystem.locate(url)
    digest, size = hashlib.sha256(), 0
    pieces = [content] if isinstance(content, bytes) else tensor_pieces(content)
    hashed: deque[Future[None]] = deque()
    # The checksum takes as long as writing: another thread makes it meanwhile.
    with ThreadPoolExecutor(1, "checksum") as hasher, _opened(fs, path) as file:
        for piece in pieces:
            enter_phase("save")
            hashed.append(hasher.submit(digest.update, piece))
            file.write(piece)
            filesystem.start_flush(file, size, len(piece))
            size += len(piece)
            if len(hashed) > _UNHASHED:
                hashed.popleft().result()
        if filesystem.is_local(url):
            file.flush()
            os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())
