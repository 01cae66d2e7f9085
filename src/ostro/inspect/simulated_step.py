"""One training step of many devices, played on this machine: what it holds and what it sends.

torch's fake process group answers every collective at once, and fake tensors have shapes but no
values, so the step of one rank of hundreds runs here through the code that a real one runs through.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ostro.core.errors import ConfigError, Problem
from ostro.core.units import format_bytes
from ostro.data.order.sequences import Batch
from ostro.distributed import World
from ostro.inspect.plan import num_tokens_of
from ostro.lm_config import TrainLmConfig
from ostro.trainer import allocate, build_model, choose_engine, init_mesh

_NAMES = {
    "allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce",
    "alltoall": "all-to-all", "broadcast": "broadcast",
}  # fmt: skip
_SAMPLE = 50


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives and their bytes by kind while code runs inside it, and live memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """Bytes of the tensor that a call gathers into, scatters, or reduces: its larger side."""
        self.peak = 0
        """The most bytes that tensors made inside held at one time, looked at every few calls."""
        self._live: dict[int, weakref.ref] = {}
        self._num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            kind = func._schema.name.partition("::")[2].strip("_").removesuffix("_base")
            kind = next((text for key, text in _NAMES.items() if kind.startswith(key)), kind)
            self.calls[kind] += 1
            self.bytes[kind] += max(map(_num_bytes, args), default=0)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):  # it wraps another
                storage = tensor.untyped_storage()
                self._live.setdefault(storage._cdata, weakref.ref(storage))
        self._num_calls += 1
        if func.namespace == "c10d" or self._num_calls % _SAMPLE == 0:
            self._look()
        return result

    def _look(self) -> None:
        held = {key: storage for key, ref in self._live.items() if (storage := ref()) is not None}
        self._live = {key: self._live[key] for key in held}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in held.values()))


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0


@dataclass(frozen=True)
class SimulatedStep:
    """What the first of the ranks did in one step."""

    parameters: int  # bytes of its part of the weights
    moments: int  # bytes of the optimizer's tensors
    working: int  # the most bytes of all else at a time: activations, gathered weights, gradients
    calls: Mapping[str, int]  # how often it called each kind of collective
    bytes: Mapping[str, int]  # bytes of the whole tensors of these calls

    def lines(self) -> Iterator[str]:
        """The figures as a table."""
        held = self.parameters + self.moments
        yield f"weights            {format_bytes(self.parameters):>10}"
        yield f"optimizer state    {format_bytes(self.moments):>10}"
        yield f"during the step    {format_bytes(self.working):>10}  at most"
        yield f"together           {format_bytes(held + self.working):>10}"
        yield "collective        calls       bytes"
        for kind, count in sorted(self.calls.items()):
            yield f"{kind:<16} {count:>6}  {format_bytes(self.bytes[kind]):>10}"


def simulate_step(config: TrainLmConfig, num_devices: int) -> SimulatedStep:
    """Play the first update of the first of `num_devices` ranks; in a process without a group."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    trainer, num_tokens = config.trainer, num_tokens_of(config)
    plan = trainer.batch_plan(num_devices)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_devices)
    try:
        world = World(torch.device("cpu"), 0, num_devices, num_data_ranks=num_devices)
        world, mesh = init_mesh(trainer, world)
        if mesh is not None and not mesh.is_split:
            rule = "nothing is split: every device holds everything, and sums its gradients once"
            raise ConfigError(Problem("trainer.fsdp_axis", rule, "no exchange to simulate", "null"))
        model = build_model(config.model, trainer, num_tokens, mesh)
        with FakeTensorMode(allow_non_fake_inputs=True):
            state = allocate(model, config.optimizer, trainer, world.device)
            engine = choose_engine(trainer, config.optimizer, plan, world, mesh)(state)
            tokens = torch.zeros(plan.micro_batch_size(0), config.model.seq_len, dtype=torch.int64)
            num_micro = plan.num_micro_batches(0)
            counter = CollectiveCounter()
            with counter:
                loss = torch.zeros(())
                for index in range(num_micro):
                    micro = Batch(tokens, tokens, None)
                    loss += engine.backward(micro, 1, is_last=index == num_micro - 1)
                engine.update(loss, 0.0, config.optimizer.max_grad_norm)
            parameters = list(state.parameters.values())
            moments = [state.optimizer.state[parameter].values() for parameter in parameters]
            return SimulatedStep(
                parameters=_num_bytes(parameters),
                moments=sum(_num_bytes(list(values)) for values in moments),
                working=counter.peak,
                calls=dict(counter.calls),
                bytes=dict(counter.bytes),
            )
    finally:
        dist.destroy_process_group()
