"""A linear layer between two named axes."""

import torch
import torch.nn.functional as F
from torch import nn

from ostro.axes import ParameterAxes
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

    The weight is (out, in). Weight and bias are stored in float32 and cast to `x.dtype`.
    """

    def __init__(
        self,
        In: tuple[str, int],
        Out: tuple[str, int],
        bias: bool = True,
        *,
        deviation: float = 0.02,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(Out[1], In[1]))
        self.bias = nn.Parameter(torch.empty(Out[1])) if bias else None
        self.parameter_axes = {"weight": ParameterAxes((Out[0],), (In[0],))}
        self.parameter_fill = {"weight": Fill(0.0, deviation)}
        if bias:
            self.parameter_axes["bias"] = ParameterAxes((Out[0],))
            self.parameter_fill["bias"] = Fill(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            num_rows = x.numel() // x.shape[-1]
            if len(row_blocks(0, num_rows, weight)) > 1:
                return _LinearByRows.apply(x, weight, bias)
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in={self.weight.shape[1]}, out={self.weight.shape[0]}, bias={self.bias is not None}"
        )
