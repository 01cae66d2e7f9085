"""How processes find each other: launchers, the rendezvous, the process group."""

from ostro.distributed.config import DistributedConfig
from ostro.distributed.process_group import World, join, joined, pick_device, place_of
from ostro.distributed.ray import RayConfig
