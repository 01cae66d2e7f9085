"""Activation functions by the names that configurations use."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 x)`, the approximation of CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "tanh": torch.tanh,
}
"""`gelu` is exact, `gelu_new` its tanh approximation (GPT-2); `swish` is another name of `silu`."""
