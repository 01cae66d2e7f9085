"""A linear layer between two named axes."""

import torch
import torch.nn.functional as F
from torch import nn

from ostro.axes import ParameterAxes
from ostro.nn.init import Fill


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
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in={self.weight.shape[1]}, out={self.weight.shape[0]}, bias={self.bias is not None}"
        )
