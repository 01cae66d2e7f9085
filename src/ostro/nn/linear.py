"""A linear layer between two named axes."""

import torch
import torch.nn.functional as F
from torch import nn

from ostro.axes import ParameterAxes
from ostro.nn.collectives import Group, enter, leave, local
from ostro.nn.init import Fill


def row_blocks(start: int, stop: int, weight: torch.Tensor) -> list[slice]:
    """Ranges of rows in which to multiply with a `weight` of (out, in), giving `in` columns.

    On CPUs oneDNN cuts a bfloat16 product of about 1024 rows for GPT-2's width of 768 badly over
    its threads: two halves take 0.6 to 0.75 of the time. Other widths and more rows are best left
    whole.
    """
    narrow = weight.is_cpu and weight.dtype == torch.bfloat16 and 640 < weight.shape[1] < 1024
    size = 512 if narrow and 512 < stop - start <= 1280 else stop - start
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


class _LinearByRows(torch.autograd.Function):
    """`F.linear` whose input gradient is computed in `row_blocks`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grad_x = grad.flatten(0, -2), torch.empty_like(x)
        flat = grad_x.view(len(rows), -1)
        for block in row_blocks(0, len(rows), weight):
            torch.mm(rows[block], weight, out=flat[block])
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, rows.T @ x.flatten(0, -2), grad_bias


class Linear(nn.Module):
    """`y = x W^T + b` from axis `In` to axis `Out`, each a (name, size).

    The weight is (out, in). Weight and bias are stored in float32 and cast to `x.dtype`. An axis
    can be split over a group of devices: each then has a part of the weight, and of x or y.
    `num_heads` says how many heads an axis `heads` is made of, `fused` of which layers.
    """

    split_in: Group | None = None
    split_out: Group | None = None

    def __init__(
        self,
        In: tuple[str, int],
        Out: tuple[str, int],
        bias: bool = True,
        *,
        deviation: float = 0.02,
        num_heads: int | None = None,
        fused: tuple[int, ...] = (1,),
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(Out[1], In[1]))
        self.bias = nn.Parameter(torch.empty(Out[1])) if bias else None
        axes = ParameterAxes((Out[0],), (In[0],), num_heads=num_heads, fused=fused)
        self.parameter_axes = {"weight": axes}
        self.parameter_fill = {"weight": Fill(0.0, deviation)}
        if bias:
            self.parameter_axes["bias"] = ParameterAxes((Out[0],), num_heads=num_heads)
            self.parameter_fill["bias"] = Fill(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return apply_all(x, self)[0]

    def _apply_local(self, x: torch.Tensor) -> torch.Tensor:
        weight = local(self.weight).to(x.dtype)
        # What a group sums gets its bias once, afterwards.
        late = self.bias is None or self.split_in is not None
        bias = None if late else local(self.bias).to(x.dtype)
        num_rows = x.numel() // x.shape[-1]
        by_rows = not torch.compiler.is_compiling() and torch.is_grad_enabled()
        if by_rows and len(row_blocks(0, num_rows, weight)) > 1:
            y = _LinearByRows.apply(x, weight, bias)
        else:
            y = F.linear(x, weight, bias)
        y = leave(y, self.split_in)
        return y + self.bias.to(x.dtype) if late and self.bias is not None else y

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in={self.weight.shape[1]}, out={self.weight.shape[0]}, bias={self.bias is not None}"
        )


def apply_all(x: torch.Tensor, *layers: Linear) -> list[torch.Tensor]:
    """What each of the layers makes of x; their input gradients are summed over a group once."""
    x = enter(x, layers[0].split_out)
    return [layer._apply_local(x) for layer in layers]
