"""Saving tensors that are split over ranks: torch's planner decides who writes what of them.

Every rank writes the shards it holds, and of what several ranks hold the first of them writes it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ostro.checkpoint.metadata import FileRecord
from ostro.core.errors import CheckpointError

SUFFIX = ".safetensors"

Tensors = Mapping[str, Mapping[str, Tensor]]  # group to name to tensor
Index = dict[str, dict[str, dict[str, Any]]]
"""Group to name to `shape` and `pieces`; a piece is [number of the file, offset, size]."""


def save_shares(
    tensors: Tensors,
    group: dist.ProcessGroup,
    begin: Callable[[], str],
    write_file: Callable[[str, Mapping[str, Tensor]], FileRecord],
    commit: Callable[[dict[str, FileRecord], Index], None],
) -> None:
    """Write `tensors` together with the other ranks; all of them call it.

    `begin` makes the folder and `commit` makes it a checkpoint, both on the first rank. What a
    rank raises is raised on all of them.
    """
    flat = {f"{part}/{name}": t for part, named in tensors.items() for name, t in named.items()}
    planner = dcp.DefaultSavePlanner(False, False, dedup_save_to_lowest_rank=True)
    writer = _Writer(list(tensors), begin, write_file, commit)
    try:
        dcp.save(flat, storage_writer=writer, planner=planner, process_group=group)
    except dcp.CheckpointException as error:
        raise error.failures[min(error.failures)][0] from error
    except RuntimeError as error:  # another rank is gone
        raise CheckpointError(f"a checkpoint cannot be saved together: {error}") from error


def on_first(group: dist.ProcessGroup | None, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises on the first rank, on all of them."""
    if group is None:
        return work()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except Exception as error:
            is_ours = isinstance(error, CheckpointError)
            outcome = [error if is_ours else CheckpointError(f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, 0, group)
    if isinstance(outcome[0], CheckpointError):
        raise outcome[0]
    return outcome[0]


def _part(item: WriteItem) -> tuple[str, str]:
    part, _, name = item.index.fqn.partition("/")
    return part, name


def _is_empty(item: WriteItem) -> bool:
    """A rank's share is empty where there are more ranks than rows."""
    data = item.tensor_data
    assert data is not None and data.chunk is not None
    return math.prod(data.chunk.sizes) == 0 < math.prod(data.size)


class _Writer(StorageWriter):
    def __init__(self, parts: list[str], begin: Any, write_file: Any, commit: Any):
        self._parts, self._begin, self._commit = parts, begin, commit
        self._write_file = write_file

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name the file of each rank for each group it holds something of."""
        folder = self._begin()
        holds = [{_part(item)[0] for item in p.items if not _is_empty(item)} for p in plans]
        shares: list[dict[str, tuple[str, int]]] = [{} for _ in plans]
        for part in self._parts:
            ranks = [rank for rank, parts in enumerate(holds) if part in parts] or [0]
            for number, rank in enumerate(ranks):
                of = f"-{number:05}-of-{len(ranks):05}" if len(ranks) > 1 else ""
                shares[rank][part] = (f"{part}{of}{SUFFIX}", number)
        pairs = zip(plans, shares, strict=True)
        return [replace(plan, storage_data=(folder, share)) for plan, share in pairs]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder, share = plan.storage_data
        tensors: dict[str, dict[str, Tensor]] = {part: {} for part in share}
        boxes: dict[str, dict[str, tuple]] = {part: {} for part in share}
        for item in plan.items:
            if not _is_empty(item):
                (part, name), data = _part(item), item.tensor_data
                tensors[part][name] = planner.resolve_data(item)
                boxes[part][name] = (data.size, data.chunk.offsets, data.chunk.sizes)
        results = []
        for part, (file, number) in share.items():
            record = self._write_file(f"{folder}/{file}", tensors[part])
            about = (part, number, record, boxes[part])
            results.append(WriteResult(MetadataIndex(file), record.bytes, about))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, FileRecord] = {}
        index: Index = {}
        for result in (result for of_rank in results for result in of_rank):
            part, number, record, boxes = result.storage_data
            files[result.index.fqn] = record
            for name, (shape, offset, size) in boxes.items():
                entry = index.setdefault(part, {}).setdefault(name, {"shape": shape, "pieces": []})
                entry["pieces"].append([number, offset, size])
        parts = {part for part in index if part + SUFFIX not in files}
        self._commit(files, {part: index[part] for part in parts})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def full_tensors(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Whole tensors on the CPU of the first rank; all ranks call it."""
    is_first = dist.get_rank() == 0
    gathered: dict[str, dict[str, Tensor]] = {part: {} for part in tensors}
    for part, named in tensors.items():
        for name, tensor in named.items():
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if is_first:
                gathered[part][name] = tensor.detach().cpu()
    return gathered
