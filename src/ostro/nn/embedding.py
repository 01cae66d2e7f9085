"""A table of vectors looked up by token or position."""

import torch
import torch.nn.functional as F
from torch import nn

from ostro.axes import ParameterAxes
from ostro.nn.init import Fill


class Embedding(nn.Module):
    """Rows of axis `Out`, one for each index of axis `In`; each a (name, size)."""

    def __init__(self, In: tuple[str, int], Out: tuple[str, int], *, deviation: float = 0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(In[1], Out[1]))
        self.parameter_axes = {"weight": ParameterAxes((Out[0],), (In[0],), lookup=True)}
        self.parameter_fill = {"weight": Fill(0.0, deviation)}

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 (...) -> (..., out), in the dtype of the table."""
        return F.embedding(indices, self.weight)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in={self.weight.shape[0]}, out={self.weight.shape[1]}"
