"""Logical axis names: what the dims of parameters and activations are called.

An *axis* is a name ("embed"); a *dim* is a position in a tensor. A parameter of a layer is
described by the axes it reads (`ins`) and the axes it writes (`outs`): a linear layer from the
residual stream to the MLP reads `embed` and writes `mlp`. Everything that treats parameters by
their role (weight decay, sharding, counting) asks these names, never a parameter's position in
a module tree.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

BATCH = "batch"
POSITION = "position"
EMBED = "embed"
HEADS = "heads"
MLP = "mlp"
VOCAB = "vocab"


@dataclass(frozen=True)
class ParameterAxes:
    """The logical axes of one parameter, in the order of its dims: outputs, then inputs."""

    outs: tuple[str, ...]
    """Axes of the leading dims: what the parameter produces. `outs[i]` names dim i."""
    ins: tuple[str, ...] = ()
    """Axes of the trailing dims: what it is multiplied with or looked up by. Empty for a bias."""
    lookup: bool = False
    """True for a table indexed by token or position (its dims are then `ins` before `outs`)."""
    num_heads: int | None = None
    """Number of heads on an axis `heads`. It can be sharded between heads, not within one."""
    fused: tuple[int, ...] = (1,)
    """Layers that are stored in one tensor, in order, by the parts of each head that they make up:
    (1, 1, 1) for queries, keys and values."""

    @property
    def names(self) -> tuple[str, ...]:
        """Axis name of each dim of the tensor, in order."""
        return self.ins + self.outs if self.lookup else self.outs + self.ins

    @property
    def is_matrix(self) -> bool:
        """True for a weight that multiplies activations: the parameters that decay by default."""
        return bool(self.ins) and not self.lookup


REPLICA, DATA, CONTEXT, MODEL = "replica", "data", "context", "model"
MESH_AXES = (REPLICA, DATA, CONTEXT, MODEL)
"""Axes of the device mesh, the slowest first: copies of the parameters, shards of them, parts of a
sequence, parts of a layer."""

Resources = Mapping[str, str | list[str]]
"""Logical axis -> the mesh axis or axes that it is split over."""


@dataclass(frozen=True)
class AxisMapping:
    """Which mesh axes each logical axis is split over, while computing and at rest."""

    compute: Mapping[str, tuple[str, ...]]
    parameter: Mapping[str, tuple[str, ...]]
    fsdp: tuple[str, ...] = ()
    """Logical axes of parameters on `data`, the first choice first."""
    warnings: list[str] = field(default_factory=list)

    def is_split(self, axis: str, mesh_axis: str) -> bool:
        """Whether computation splits `axis` over `mesh_axis`."""
        return mesh_axis in self.compute.get(axis, ())


def map_axes(
    *,
    batch_axis: str | None,
    fsdp_axis: str | list[str] | None,
    tensor_parallel_axes: str | list[str] | None,
    axis_resources: Resources | None = None,
    parameter_axis_resources: Resources | None = None,
    compute_axis_resources: Resources | None = None,
) -> AxisMapping:
    """The mapping that settings describe; a basic setting wins over an advanced one, and says so.

    Computation takes `axis_resources`, then `tensor_parallel_axes`, then `batch_axis`, then
    `compute_axis_resources`; parameters take that, then `parameter_axis_resources`, then
    `fsdp_axis`.
    """
    warnings: list[str] = []

    def put(into: dict[str, tuple[str, ...]], axes: Iterable[str], where: tuple[str, ...], by: str):
        for axis in axes:
            if into.get(axis, where) != where:
                old, new = "+".join(into[axis]), "+".join(where)
                warnings.append(f"axis {axis} goes to {new}, not to {old}: {by} wins")
            into[axis] = where

    compute = _tuples(axis_resources)
    put(compute, _names(tensor_parallel_axes), (MODEL,), "tensor_parallel_axes")
    put(compute, _names(batch_axis), (REPLICA, DATA), "batch_axis")
    compute |= _tuples(compute_axis_resources)
    parameter = compute | _tuples(parameter_axis_resources)
    fsdp = _names(fsdp_axis)
    put(parameter, fsdp, (DATA,), "fsdp_axis")
    at_rest = [axis for axis, where in parameter.items() if DATA in where and axis not in fsdp]
    at_rest = [axis for axis in at_rest if DATA not in compute.get(axis, ())]
    return AxisMapping(compute, parameter, (*fsdp, *at_rest), warnings)


def _names(axes: str | list[str] | None) -> list[str]:
    return [axes] if isinstance(axes, str) else list(axes or [])


def _tuples(resources: Resources | None) -> dict[str, tuple[str, ...]]:
    return {axis: tuple(_names(where)) for axis, where in (resources or {}).items()}


@dataclass(frozen=True)
class MeshSizes:
    """Devices along each mesh axis."""

    replica: int = 1
    data: int = 1
    context: int = 1
    model: int = 1

    @property
    def num_data_ranks(self) -> int:
        """Into how many parts a batch is cut."""
        return self.replica * self.data

    @property
    def num_devices(self) -> int:
        """Devices of the whole mesh."""
        return self.replica * self.data * self.context * self.model

    def __str__(self) -> str:
        return " x ".join(f"{getattr(self, axis)} {axis}" for axis in MESH_AXES)
