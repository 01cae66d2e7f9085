"""The device mesh of a run and the process groups along its axes."""

from dataclasses import dataclass, replace

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ostro.axes import MeshSizes
from ostro.distributed import World
from ostro.nn.collectives import Group


@dataclass(frozen=True)
class Mesh:
    """The devices of a run, laid out by mesh axis; the last axis varies fastest with the rank."""

    sizes: MeshSizes
    parameters: DeviceMesh
    """Axes replica, data (with context), model: what parameters are laid out on."""
    context: Group | None
    """The devices that share this one's sequences."""
    is_split: bool
    """Whether parameters are split or layers shared; otherwise all devices hold copies."""

    @property
    def model(self) -> Group | None:
        """The devices that share this one's layers."""
        if self.sizes.model == 1:
            return None
        mesh = self.parameters["model"]
        return Group(mesh.get_group(), mesh.get_local_rank(), self.sizes.model)


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
    return world, Mesh(sizes, parameters, context, shards or sizes.model > 1)
