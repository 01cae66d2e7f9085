"""Checkpoints in one file that `torch.load(weights_only=True)` reads.

    experiments/x/checkpoints/step_1000.pt  latest_checkpoint.pt     format: file
    out/ckpt.pt                                                      format: nanogpt

Where one file cannot hold a state, `latest_checkpoint.pt` is a text that names the newest folder.

Files are written under another name, flushed, and renamed into place. Nothing but tensors and
plain values is ever read from one.
"""

import contextlib
import errno
import importlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostro.checkpoint.metadata import YEAR_9999
from ostro.checkpoint.pieces import Stored, whole
from ostro.checkpoint.stamp import Stamp
from ostro.checkpoint.store import State
from ostro.core.errors import CheckpointError
from ostro.io import filesystem
from ostro.io.json_schema import FILE_NAME, read_object
from ostro.io.torch_files import read_file
from ostro.runtime.phase import enter_phase

LATEST = "latest_checkpoint.pt"
NANOGPT = "ckpt.pt"
INTERRUPTED = "ckpt_interrupted.pt"
"""Beside a `ckpt.pt` that holds the best weights: where the run was when it was stopped."""
WANTED = re.compile(r"ckpt\.pt|ckpt_interrupted\.pt|step_.*\.pt|latest_checkpoint\.pt")
"""What a checkpoint file may be called where a folder is searched."""
_RESERVE = 1 << 20  # bytes of a file beside its tensors, generously


class FileFormat:
    """How a state lies in the mapping that is saved: here the groups of a state as they are,
    `model`, `optimizer`, `state`, `values`, `texts`. Others have the same methods."""

    def pack(self, state: State) -> dict[str, Any]:
        """The mapping for a state: tensors and plain values."""
        groups = {name: dict(tensors) for name, tensors in state.tensors.items()}
        return {"format": "ostro", **groups, "values": state.values, "texts": dict(state.texts)}

    def unpack(self, content: Mapping[str, Any], where: str) -> State:
        """The state in such a mapping; `CheckpointError` when something is missing."""
        rest = {name: value for name, value in content.items() if name != "format"}
        values, texts = rest.pop("values", None), rest.pop("texts", None)
        if values is None or texts is None or "model" not in rest:
            raise CheckpointError(f"{where} - is incomplete: model, values or texts are missing")
        return State(rest, values, texts)

    def fits(self, content: Mapping[str, Any]) -> bool:
        """Whether the mapping looks like this format."""
        return content.get("format") == "ostro"


FORMATS: dict[str, Any] = {"file": FileFormat()}


_ELSEWHERE = {"nanogpt": ("ostro.compat.nanogpt.checkpoint_file", "FORMAT")}
"""Module and name of formats of other programs, imported once a file may be of that format."""


def register_format(name: str, file_format: Any) -> None:
    """Make a format known under the name that `checkpointer.format` gives it."""
    FORMATS[name] = file_format


def format_called(name: str) -> Any:
    """The format of that name."""
    if name not in FORMATS:
        module, attribute = _ELSEWHERE[name]
        register_format(name, getattr(importlib.import_module(module), attribute))
    return FORMATS[name]


def point_to(path: Path) -> None:
    """Make `latest_checkpoint.pt` beside a checkpoint the same file, a copy where there are no
    links; beside a folder a small text that names it."""
    new = path.parent / f"{filesystem.PARTIAL}{LATEST}-{os.getpid()}"
    new.unlink(missing_ok=True)
    if path.is_dir():
        new.write_text(json.dumps({"format": "ostro", "folder": path.name}) + "\n")
    else:
        try:
            os.link(path, new)
        except OSError:
            shutil.copyfile(path, new)
    os.replace(new, path.parent / LATEST)
    filesystem.flush_folder(str(path.parent))


def pointed_folder(path: Path) -> str | None:
    """The folder that such a file names; None where it is another kind of file."""
    with open(path, "rb") as file:
        if file.read(1) != b"{":
            return None
    named = read_object(path.read_bytes(), str(path), CheckpointError, {"folder": FILE_NAME})
    return str(path.parent / named["folder"])


def write_file(path: Path, content: Mapping[str, Any], stamp: Stamp | None = None) -> None:
    """Save a mapping of tensors and plain values atomically, with a stamp at its end.

    Raises `CheckpointError` where the disk is too small, fills up, or refuses; the file that was
    there is untouched then.
    """
    filesystem.require_space(str(path.parent), space_for(content))
    new = path.parent / f"{filesystem.PARTIAL}{path.name}-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "wb") as file:
            enter_phase("save")
            torch.save(content, file)
            if stamp is not None:
                file.flush()
                stamp.write(new)
            file.flush()
            os.fsync(file.fileno())
        enter_phase("commit")
        os.replace(new, path)  # the commit
        enter_phase("commit")
        filesystem.flush_folder(str(path.parent))
    except BaseException as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        # torch's writer turns a full disk into a RuntimeError
        if isinstance(error, (OSError, RuntimeError)):
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else f"cannot be written: {error}"
            advice = "what was there is untouched; free space or write elsewhere"
            raise CheckpointError(f"{path} - {what} - {advice}") from error
        raise


def space_for(content: Mapping[str, Any]) -> int:
    """The bytes that a file of `content` takes at most."""
    return sum(t.numel() * t.element_size() for t in _tensors(content)) + _RESERVE


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else ()
    return [tensor for child in values for tensor in _tensors(child)]


@dataclass(frozen=True)
class SavedFile:
    """A checkpoint in one file, opened. As `saved.Saved`: `values`, `texts`, `tensors(group)`."""

    path: str
    values: Mapping[str, Any]  # what is no tensor
    texts: Mapping[str, str]  # by name
    by_group: Mapping[str, Mapping[str, Tensor]]
    timestamp: float = 0.0  # when it was saved, in seconds since 1970; 0: the file does not say

    def __str__(self) -> str:
        return self.path

    @property
    def lacks(self) -> str:
        """Why a run cannot resume from it, empty if it can: it holds the weights in any case."""
        return "" if "optimizer" in self.by_group else f"{self.path} - holds no optimizer state"

    @property
    def step(self) -> int:
        """0-based index of the last update."""
        return int(self.values["step"]) - 1

    @property
    def groups(self) -> list[str]:
        """The groups of tensors that it holds."""
        return list(self.by_group)

    def tensors(self, group: str) -> Mapping[str, Tensor]:
        """The tensors of one group, on the CPU."""
        if group not in self.by_group:
            raise CheckpointError(f"{self.path} - holds no {group!r} tensors")
        return self.by_group[group]

    def stored(self, group: str) -> dict[str, Stored]:
        """The same, each as one piece."""
        return whole(self.tensors(group))


def load_file(path: str | Path, *, check: bool = True) -> SavedFile:
    """Open a checkpoint file; `CheckpointError` names the file and what is wrong with it.

    `check` false as for `read_file`.
    """
    content = read_file(Path(path), check=check)
    for file_format in map(format_called, [*FORMATS, *(_ELSEWHERE.keys() - FORMATS)]):
        if file_format.fits(content):
            state = file_format.unpack(content, str(path))
            if not _is_state(state):
                raise CheckpointError(f"{path} - is damaged: its parts are not of the right types")
            values = dict(state.values)
            time = values.pop("timestamp", 0.0)
            time = time if isinstance(time, float) and 0 <= time < YEAR_9999 else 0.0
            return SavedFile(str(path), values, state.texts, state.tensors, time)
    found = ", ".join(map(str, list(content)[:8]))
    raise CheckpointError(f"{path} - is no checkpoint of ostro or nanoGPT: it holds {found}")


def read_stamp(path: str) -> Stamp:
    """Step and commit time of a checkpoint file, from its end where they stand there too."""
    try:
        stamp = Stamp.read(Path(path))
    except OSError as error:
        raise CheckpointError(f"{path} - cannot be read: {error}") from error
    if stamp is not None:
        return stamp
    saved = load_file(path, check=False)
    marks = {name: bool(saved.values.get(name)) for name in ("is_temporary", "is_best")}
    run_id = str(saved.values.get("run_id", ""))
    return Stamp(saved.step, saved.timestamp, run_id=run_id, **marks)


def _is_state(state: State) -> bool:
    """Whether what was read is what `State` says; a file may hold anything under these names."""
    values, texts, groups = state.values, state.texts, state.tensors.values()
    mappings = all(isinstance(part, dict) for part in (values, texts, *groups))
    return (
        mappings
        and type(values.get("step")) is int
        and all(isinstance(text, str) for pair in texts.items() for text in pair)
        and all(isinstance(tensor, Tensor) for group in groups for tensor in group.values())
    )
