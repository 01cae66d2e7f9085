"""Where each parameter lies: names and mapping in, placements out. No processes, no tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from ostro.core.axes import DATA, HEADS, MODEL, VOCAB, AxisMapping, MeshSizes
from ostro.core.axes import ParameterAxes as Axes
from ostro.core.errors import ConfigError, Problem
from ostro.core.units import columns, format_bytes


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is laid out."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    """Axis name of each dim."""
    dims: Mapping[str, int]
    """Mesh axis -> the dim that is split over it. `data` stands for `data` x `context`."""
    local_shape: tuple[int, ...]
    """What the first device holds: the largest part."""

    @property
    def local_size(self) -> int:
        """Elements that the first device holds."""
        return prod(self.local_shape)


def plan_sharding(
    parameters: Mapping[str, tuple[tuple[int, ...], Axes]], mapping: AxisMapping, sizes: MeshSizes
) -> dict[str, ParameterPlan]:
    """Where each parameter (shape, axes) lies; `ConfigError` lists all that cannot be divided.

    `model` splits the dims whose axis the mapping puts there. `data` splits every parameter, if
    `fsdp_axis` names any axis: along the first of these that the parameter has, else along its
    first dim. Only a vocabulary, and a dim that comes first and that no setting names, may come
    out uneven.
    """
    problems: dict[tuple[str, str], Problem] = {}  # one for each setting and axis
    plans = {}
    for name, (shape, axes) in parameters.items():
        dims = {}
        if sizes.model > 1:
            split = [d for d, axis in enumerate(axes.names) if mapping.is_split(axis, MODEL)]
            if split:
                dims[MODEL] = split[0]
                for problem in _model_problems(name, shape, axes, split, sizes.model):
                    problems.setdefault((problem.setting, axes.names[split[0]]), problem)
        num_shards = sizes.data * sizes.context
        if mapping.fsdp and num_shards > 1:
            dims[DATA] = _fsdp_dim(axes, mapping, dims.get(MODEL))
            for problem in _fsdp_problems(name, shape, axes, dims[DATA], mapping, num_shards):
                problems.setdefault((problem.setting, axes.names[dims[DATA]]), problem)
        local = list(shape)
        for axis, size in ((MODEL, sizes.model), (DATA, num_shards)):
            if axis in dims:
                local[dims[axis]] = -(-local[dims[axis]] // size)
        plans[name] = ParameterPlan(shape, axes.names, dims, tuple(local))
    if problems:
        raise ConfigError([*problems.values()])
    return plans


def _model_problems(
    name: str, shape: tuple[int, ...], axes: Axes, split: list[int], degree: int
) -> Iterator[Problem]:
    axis, size = axes.names[split[0]], shape[split[0]]
    if len(split) > 1:
        rule = f"parameter {name} would be split over model along {axes.names}"
        yield Problem("trainer.tensor_parallel_axes", rule, "name one of the two", axis)
    elif axis == HEADS and axes.num_heads is not None and axes.num_heads % degree:
        rule = f"the {axes.num_heads} heads of parameter {name} (axis heads) are split over them"
        advice = "use a divisor of the number of heads (key-value heads where they are fewer)"
        yield Problem("trainer.model_axis_size", rule, advice, str(degree))
    elif axis != VOCAB and size % degree:
        rule = f"must divide axis {axis} of parameter {name}, of size {size}"
        yield Problem("trainer.model_axis_size", rule, "", str(degree))
    elif -(-size // degree) * (degree - 1) >= size:
        rule = f"leaves a device without a part of axis {axis} of {name}, of size {size}"
        yield Problem("trainer.model_axis_size", rule, "use a smaller one", str(degree))


def _fsdp_dim(axes: Axes, mapping: AxisMapping, taken: int | None) -> int:
    named = [axes.names.index(axis) for axis in mapping.fsdp if axis in axes.names]
    free = [dim for dim in (*named, *range(len(axes.names))) if dim != taken]
    return free[0] if free else 0


def _fsdp_problems(
    name: str, shape: tuple[int, ...], axes: Axes, dim: int, mapping: AxisMapping, degree: int
) -> Iterator[Problem]:
    axis, size = axes.names[dim], shape[dim]
    if size % degree and (dim > 0 or axis in mapping.fsdp):
        rule = (
            f"axis {axis} of parameter {name} has size {size}, which cannot be divided by the"
            f" {degree} devices that share it"
        )
        advice = "change the number of devices, name another axis, or null for copies"
        yield Problem("trainer.fsdp_axis", rule, advice, axis)


def table(plans: Mapping[str, ParameterPlan], itemsize: int) -> Iterator[str]:
    """The plan for people: parameter, axes, the dim on each mesh axis, bytes per device."""
    rows = [("parameter", "shape", "model", "data", "bytes per device")]
    for name, plan in plans.items():
        shape = " x ".join(f"{a} {n}" for a, n in zip(plan.names, plan.shape, strict=True))
        where = [
            f"{plan.names[plan.dims[axis]]} (dim {plan.dims[axis]})" if axis in plan.dims else "-"
            for axis in (MODEL, DATA)
        ]
        rows.append((name, shape, *where, str(plan.local_size * itemsize)))
    yield from columns(rows, right=[4])
    whole = sum(prod(plan.shape) for plan in plans.values()) * itemsize
    own = sum(plan.local_size for plan in plans.values()) * itemsize
    yield f"parameters: {format_bytes(whole)} in all, {format_bytes(own)} on each device"
    yield f"with gradients and two moments of AdamW: {format_bytes(4 * own)} on each device"
