"""What modules say about their parameters: how each is filled, and what its dims are called.

A module of `ostro.nn` carries two dicts for the parameters it owns directly: `parameter_axes`
(`ParameterAxes` by name) and `parameter_fill` (`Fill` by name). They live on the module because
attributes of a parameter do not survive `deepcopy`, `Module.to` or FSDP.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ostro.core.axes import ParameterAxes
from ostro.core.errors import ConfigError, Problem
from ostro.nn.collectives import local

_ADVICE = (
    "use Linear, Embedding, LayerNorm or RMSNorm of ostro.nn, or give the module that owns it"
    ' parameter_axes = {{"{key}": ParameterAxes(outs, ins)}} (ostro.core.axes), by which it is'
    " sharded and decays or not, and parameter_fill ="
    ' {{"{key}": Fill(mean, deviation)}} (ostro.nn.init)'
)


@dataclass(frozen=True)
class Fill:
    """The first values of a parameter: normal(mean, deviation), or the constant `mean`."""

    mean: float
    deviation: float = 0.0


def axes_of(model: nn.Module) -> dict[str, ParameterAxes]:
    """The axis names of every parameter, by full name; a shared parameter is listed once."""
    found = {
        _join(prefix, name): axes
        for prefix, module in model.named_modules()
        for name, axes in getattr(module, "parameter_axes", {}).items()
    }
    _require_described(model, found)
    return {name: found[name] for name, _ in model.named_parameters()}


def _require_described(model: nn.Module, axes: Mapping[str, ParameterAxes]) -> None:
    """`ConfigError` where a module says too little of what it owns: it comes from elsewhere."""
    for prefix, module in model.named_modules():
        fills = getattr(module, "parameter_fill", {})
        for name, parameter in module.named_parameters(prefix, recurse=False):
            kind, key = type(module).__name__, name.rpartition(".")[2]
            if name not in axes or key not in fills:
                rule = f"parameter {name} of a {kind} has no axis names or no first values"
                raise ConfigError(Problem("model.type", rule, _ADVICE.format(key=key)))
            if len(axes[name].names) != parameter.ndim:
                rule = f"parameter {name} has {parameter.ndim} dims and axes {axes[name].names}"
                raise ConfigError(Problem("model.type", rule, "name the axis of each dim"))
        for name, _ in module.named_buffers(prefix, recurse=False):
            rule = f"{name} is a buffer, which is neither filled nor saved"
            raise ConfigError(Problem("model.type", rule, "compute it where it is used"))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter from a generator of its own, keyed by (seed, full name).

    The values do not depend on the order of modules, the number of threads, the device or how
    parameters are split: they are drawn whole on the CPU in float32 and copied.
    """
    for prefix, module in model.named_modules():
        for name, fill in getattr(module, "parameter_fill", {}).items():
            parameter = getattr(module, name)
            if fill.deviation == 0:
                local(parameter).fill_(fill.mean)
                continue
            key = hashlib.sha256(f"{seed}/{_join(prefix, name)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
            values = torch.empty(parameter.shape, device="cpu")
            values.normal_(fill.mean, fill.deviation, generator=generator)
            assign(parameter, values)


@torch.no_grad()
def assign(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy into a parameter, if it is split the part of `whole` that lies on this device."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        placements: Any = getattr(parameter, "placements", ())
        # The last mesh axis first: FSDP cuts what tensor parallelism has left.
        for axis in reversed(range(mesh.ndim)):
            dim = getattr(placements[axis], "dim", None)
            if dim is not None:
                size = -(-whole.shape[dim] // mesh.size(axis))
                start = min(mesh.get_local_rank(axis) * size, whole.shape[dim])
                whole = whole.narrow(dim, start, min(size, whole.shape[dim] - start))
    local(parameter).copy_(whole)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
