"""A table of vectors looked up by token or position."""

import torch
import torch.nn.functional as F
from torch import nn

from ostro.core.axes import ParameterAxes
from ostro.nn.collectives import Group, leave, local
from ostro.nn.init import Fill


class Embedding(nn.Module):
    """Rows of axis `Out`, one for each index of axis `In`; each a (name, size).

    `In` can be split over a group of devices: each then has some of the rows.
    """

    split_in: Group | None = None

    def __init__(self, In: tuple[str, int], Out: tuple[str, int], *, deviation: float = 0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(In[1], Out[1]))
        self.parameter_axes = {"weight": ParameterAxes((Out[0],), (In[0],), lookup=True)}
        self.parameter_fill = {"weight": Fill(0.0, deviation)}

    def forward(self, indices: torch.Tensor, tie: "TiedGradient | None" = None) -> torch.Tensor:
        """int64 (...) -> (..., out), in the dtype of the table.

        With `tie` the gradient goes where the head that shares the table has put its own.
        """
        weight = local(self.weight)
        if self.split_in is not None:
            part = _lookup_part(weight, indices, len(self.weight), self.split_in)
            return leave(part, self.split_in)
        if tie is not None and torch.is_grad_enabled() and weight is self.weight:
            return _TiedLookup.apply(weight, indices, tie)
        return F.embedding(indices, weight)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in={self.weight.shape[0]}, out={self.weight.shape[1]}"


def first_row(num_rows: int, group: Group) -> int:
    """The first row of this device, where `num_rows` are cut as `torch.chunk` does."""
    return min(group.rank * -(-num_rows // group.size), num_rows)


def _lookup_part(
    part: torch.Tensor, indices: torch.Tensor, num_rows: int, group: Group
) -> torch.Tensor:
    """Rows that lie on this device, and zeros for the others."""
    own = indices - first_row(num_rows, group)
    is_here = (own >= 0) & (own < len(part))
    return F.embedding(own.where(is_here, 0), part) * is_here.unsqueeze(-1)


class TiedGradient:
    """The gradient of a table that is also the weight of the head, on its way back.

    The head's part is dense and comes first; the lookup adds its few rows in place. A second dense
    gradient, filled with zeros for every token that was not looked up, is never made.
    """

    def __init__(self) -> None:
        self.wanted = False  # a lookup will fetch it; otherwise nothing may hold on to it
        self.gradient: torch.Tensor | None = None


class _TiedLookup(torch.autograd.Function):
    """`F.embedding` whose gradient joins the one in a `TiedGradient`.

    That is safe because autograd hands a parameter its gradient only after all its uses have been
    walked back, and a lookup is walked back after everything that was computed from it.
    """

    @staticmethod
    def forward(ctx, weight, indices, tie):
        ctx.save_for_backward(indices)
        ctx.tie, ctx.like = tie, weight.detach()
        tie.wanted = True
        return F.embedding(indices, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        made, ctx.tie.gradient = ctx.tie.gradient, None
        rows = grad.flatten(0, -2)
        if made is not None:
            made.index_add_(0, indices.flatten(), rows.to(made.dtype))
            return None, None, None
        alone = torch.zeros_like(ctx.like).index_add_(0, indices.flatten(), rows.to(ctx.like.dtype))
        return alone, None, None
