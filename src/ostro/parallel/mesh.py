"""The device mesh of a run and the process groups along its axes."""

from dataclasses import dataclass, replace

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ostro.core.axes import MeshSizes
from ostro.distributed import World
from ostro.nn.collectives import Group


@dataclass(frozen=True)
class Mesh:
    """The devices of a run, laid out by mesh axis; the last axis varies fastest with the rank."""

    sizes: MeshSizes
    model_mesh: DeviceMesh
    """The axis model: over it layers are split."""
    fsdp_mesh: DeviceMesh | None
    """The axes replica and data, or data alone: over them FSDP keeps copies, and parts."""
    model: Group | None
    """The devices that share this one's layers."""
    context: Group | None
    """The devices that share this one's sequences."""
    is_split: bool
    """Whether parameters are split or layers shared; otherwise all devices hold copies."""


def arrange(world: World, sizes: MeshSizes, *, shards: bool) -> tuple[World, Mesh | None]:
    """Lay the ranks out as a mesh; the world then knows which part of the data is this rank's.

    Without `shards` the axes data and context hold copies of the parameters.
    """
    if world.num_ranks == 1:
        return world, None
    assert sizes.num_devices == world.num_ranks, f"{sizes} and {world.num_ranks} ranks"
    kind, num_parts = world.device.type, sizes.data * sizes.context
    copies = sizes.replica * (1 if shards else num_parts)
    parameters = init_device_mesh(
        kind,
        (copies, num_parts if shards else 1, sizes.model),
        mesh_dim_names=("replica", "data", "model"),
    )
    context_rank, context = 0, None
    if sizes.context > 1:
        shape = (sizes.num_data_ranks, sizes.context, sizes.model)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("batch", "context", "model"))[
            "context"
        ]
        context_rank = mesh.get_local_rank()
        context = Group(mesh.get_group(), context_rank, sizes.context)
    batch = None
    if sizes.model > 1:
        shape = (sizes.num_devices // sizes.model, sizes.model)
        batch = init_device_mesh(kind, shape, mesh_dim_names=("batch", "model"))[
            "batch"
        ].get_group()
    world = replace(
        world,
        data_rank=world.rank // (sizes.context * sizes.model),
        num_data_ranks=sizes.num_data_ranks,
        context_rank=context_rank,
        batch_group=batch,
    )
    # Slices are made here: making one looks at values, which a simulated step does not have.
    models = parameters["model"]
    model = Group(models.get_group(), models.get_local_rank(), sizes.model)
    fsdp = parameters["replica", "data"] if copies > 1 else parameters["data"]
    mesh = Mesh(
        sizes,
        models,
        fsdp if fsdp.size() > 1 else None,
        model if sizes.model > 1 else None,
        context,
        is_split=shards or sizes.model > 1,
    )
    return world, mesh
