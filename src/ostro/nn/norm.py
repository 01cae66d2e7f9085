"""Normalisation over the last dim, together with the addition that comes before it.

What is added to is the sum that runs through the blocks. It is kept in float32, as under torch's
autocast: rounded to bfloat16 in every block it, and its gradient, part a run from one in float32
(see the lab notes). What is added, and the result, have the dtype of the computation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostro import kernels
from ostro.core.axes import ParameterAxes
from ostro.nn.init import Fill


class _Norm(nn.Module):
    is_centred: bool

    def __init__(self, Axis: tuple[str, int], *, eps: float, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.eps, self.dtype = eps, dtype
        self.weight = nn.Parameter(torch.empty(Axis[1]))
        self.bias = nn.Parameter(torch.empty(Axis[1])) if bias else None
        self.parameter_axes = {"weight": ParameterAxes((Axis[0],))}
        self.parameter_fill = {"weight": Fill(1.0)}
        if bias:
            self.parameter_axes["bias"] = ParameterAxes((Axis[0],))
            self.parameter_fill["bias"] = Fill(0.0)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float32 (..., size), and what is added to it -> the sum, and that normalised."""
        kind = {"dtype": self.dtype, "is_centred": self.is_centred}
        found = kernels.normalise(x, added, self.weight, self.bias, self.eps, **kind)
        if found is not None:
            return found
        x = x if added is None else x + added
        # FSDP hands out gains in the dtype of the computation, and so has all that is to equal it.
        gain = self.weight.to(self.dtype).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype).to(x.dtype)
        if self.is_centred:
            normed = F.layer_norm(x, self.weight.shape, gain, bias, self.eps)
        else:
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * gain
        return x, normed.to(self.dtype)


class LayerNorm(_Norm):
    """Zero mean and unit variance over axis `Axis` (name, size), then a gain and a bias."""

    is_centred = True


class RMSNorm(_Norm):
    """Unit root mean square over axis `Axis` (name, size), then a gain."""

    is_centred = False
