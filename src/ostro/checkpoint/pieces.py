"""Tensors of a checkpoint in the pieces that ranks saved, and copying what a rank needs of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed.checkpoint.metadata as described
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: where it starts, how large it is, and what reads it to the CPU."""

    offset: torch.Size
    size: torch.Size
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor that is not read yet."""

    shape: torch.Size
    pieces: Sequence[Piece]

    def full(self) -> Tensor:
        """The whole tensor, on the CPU."""
        if len(self.pieces) == 1:
            return self.pieces[0].read()
        parts = [piece.read() for piece in self.pieces]  # mapped; there, before memory is taken
        full = torch.empty(self.shape, dtype=parts[0].dtype)
        for piece, part in zip(self.pieces, parts, strict=True):
            _box(full, piece.offset, piece.size).copy_(part)
        return full


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Tensors that are here, each as one piece."""
    return {
        name: Stored(t.shape, [Piece(torch.Size([0] * t.ndim), t.shape, lambda t=t: t)])
        for name, t in tensors.items()
    }


def copy_into(targets: Mapping[str, Tensor], source: Mapping[str, Stored]) -> None:
    """Copy tensors of the same names and shapes; of a DTensor only what this rank holds is read.

    Not a collective: torch's planner cuts what is here out of the pieces that were saved.
    """
    stored = {
        name: described.TensorStorageMetadata(
            described.TensorProperties(),
            source[name].shape,
            [described.ChunkStorageMetadata(p.offset, p.size) for p in source[name].pieces],
        )
        for name in targets
    }
    for item in create_default_local_load_plan(dict(targets), described.Metadata(stored)).items:
        name, index = item.storage_index.fqn, item.storage_index.index
        assert index is not None
        piece, target = source[name].pieces[index].read(), targets[name]
        local = target.to_local() if isinstance(target, DTensor) else target
        saved = _box(piece, item.storage_offsets, item.lengths)
        _box(local, item.dest_offsets, item.lengths).copy_(saved)


def _box(tensor: Tensor, offset: Sequence[int], size: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
