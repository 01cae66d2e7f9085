"""Activation functions by the names that configurations use."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ostro import kernels


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 x)`, the approximation of CLIP."""
    return x * torch.sigmoid(1.702 * x)


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation, as GPT-2 has it."""
    found = kernels.gelu(x)
    return F.gelu(x, approximate="tanh") if found is None else found


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu_python_tanh": gelu_new,
    "gelu_fast": gelu_new,
    "gelu_accurate": gelu_new,
    "quick_gelu": quick_gelu,
    "tanh": torch.tanh,
}
"""`gelu` is exact, `gelu_new` its tanh approximation (GPT-2). Several names stand for one function,
as in transformers, so that the name in a `config.json` is kept."""
