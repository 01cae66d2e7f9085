"""How processes find each other: launchers, the rendezvous, the process group."""

from ostro.distributed.config import DistributedConfig
from ostro.distributed.process_group import (
    World,
    join_process_group,
    open_process_group,
    pick_device,
    rank_info_of,
)
from ostro.distributed.ray import RayConfig
