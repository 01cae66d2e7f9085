"""One mapping shards every model: a plan of placements, and what carries it out with torch."""

from ostro.parallel.apply import compile_blocks, shard
from ostro.parallel.mesh import Mesh, arrange
from ostro.parallel.plan import plan_sharding, table
