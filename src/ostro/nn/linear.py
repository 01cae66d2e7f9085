"""A linear layer between two named axes."""

import torch
import torch.nn.functional as F
from torch import nn

from ostro import kernels
from ostro.core.axes import ParameterAxes
from ostro.nn.collectives import Group, enter, leave, local
from ostro.nn.init import Fill


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
        # What a group sums gets its bias once, afterwards.
        late = self.bias is None or self.split_in is not None
        weight, bias = local(self.weight), None if late else local(self.bias)
        y = kernels.linear(x, weight, bias)
        if y is None:
            y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
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
