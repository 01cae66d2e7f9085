"""Normalisation over the last dim. Statistics are float32, the result has the input's dtype."""

import torch
import torch.nn.functional as F
from torch import nn

from ostro import native
from ostro.axes import ParameterAxes
from ostro.nn.init import Fill


class LayerNorm(nn.Module):
    """Zero mean and unit variance over axis `Axis` (name, size), then a gain and a bias."""

    def __init__(self, Axis: tuple[str, int], *, eps: float, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(Axis[1]))
        self.bias = nn.Parameter(torch.empty(Axis[1])) if bias else None
        self.parameter_axes = {"weight": ParameterAxes((Axis[0],))}
        self.parameter_fill = {"weight": Fill(1.0)}
        if bias:
            self.parameter_axes["bias"] = ParameterAxes((Axis[0],))
            self.parameter_fill["bias"] = Fill(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        # A gain near 1 that is rounded to bfloat16 shows in the loss curve; FSDP hands out rounded
        # ones, and so has all that is to equal it. Our kernels keep them as they are.
        found = native.normalise(x, self.weight, self.bias, self.eps, is_centred=True)
        if found is not None:
            return found
        gain, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, gain, bias, self.eps)


class RMSNorm(nn.Module):
    """Unit root mean square over axis `Axis` (name, size), then a gain."""

    def __init__(self, Axis: tuple[str, int], *, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(Axis[1]))
        self.parameter_axes = {"weight": ParameterAxes((Axis[0],))}
        self.parameter_fill = {"weight": Fill(1.0)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        found = native.normalise(x, self.weight, None, self.eps, is_centred=False)
        if found is not None:
            return found
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight.to(x.dtype)
