"""Communication between the devices that share a layer or a sequence, as steps of autograd.

A layer whose outputs are split over a group sums the gradients of its input (`enter`); one whose
inputs are split sums its outputs (`leave`). These are the f and g of Megatron-LM
(arXiv:1909.08053). `gather_sequence` brings the parts of a sequence together.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The devices along one mesh axis, and this one's place among them."""

    handle: dist.ProcessGroup
    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over the group, in place."""
        dist.all_reduce(tensor, group=self.handle)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of the group's values, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.handle)
        return tensor


def local(parameter: Tensor) -> Tensor:
    """This device's part of a parameter that is split, or the parameter; gradients flow."""
    to_local: Any = getattr(parameter, "to_local", None)  # importing DTensor takes time
    return parameter if to_local is None else to_local()


def enter(x: Tensor, group: Group | None) -> Tensor:
    """The same on every device of the group; its gradient is the sum of theirs."""
    return x if group is None else _Enter.apply(x, group)


def leave(x: Tensor, group: Group | None) -> Tensor:
    """The sum over the group; its gradient is the same on every device."""
    return x if group is None else _Leave.apply(x, group)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.sum(grad.clone(memory_format=torch.contiguous_format)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return group.sum(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def gather(x: Tensor, group: Group, size: int) -> Tensor:
    """Parts of the last dim, cut as `torch.chunk` does, as the whole of `size`; no gradient."""
    padded = F.pad(x, (0, -(-size // group.size) - x.shape[-1]))
    return torch.cat([*_parts(padded, group)], -1)[..., :size]


def _parts(x: Tensor, group: Group) -> Tensor:
    """Everyone's x, one after another in a new first dim."""
    parts = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    dist.all_gather_single(parts, x.contiguous(), group=group.handle)
    return parts.unflatten(0, (group.size, -1))


def sequence_part(num_tokens: int, group: Group, device: torch.device) -> Tensor:
    """The positions of a sequence that this device works on.

    The sequence is cut into twice as many pieces as there are devices; each takes one from the
    front and one from the back, so that all see equally many keys (arXiv:2407.21783, 3.3.2).
    """
    pieces = torch.arange(num_tokens, device=device).chunk(2 * group.size)
    return torch.cat([pieces[group.rank], pieces[-1 - group.rank]])


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """`sequence_part`s (batch, heads, position, size) of all devices as the whole sequence.

    Each device's gradient is the sum of the group's for its part.
    """
    return _GatherSequence.apply(x, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        fronts, backs = _parts(x, group).chunk(2, 3)
        return torch.cat([*fronts, *reversed(backs)], 2)

    @staticmethod
    def backward(ctx, grad):
        size = ctx.group.size
        pieces = grad.chunk(2 * size, 2)
        parts = [torch.cat([pieces[rank], pieces[-1 - rank]], 2) for rank in range(size)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_single(mine, torch.cat(parts), group=ctx.group.handle)
        return mine, None
