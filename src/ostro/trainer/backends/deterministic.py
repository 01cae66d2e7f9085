"""The same bits on 1, 2 and 4 devices: gradients of single sequences, summed in one fixed tree.

Floating-point sums depend on their order. Here every sequence goes through the model alone, so that
its loss and gradient do not depend on what it is batched with, and all of a batch are added
pairwise, neighbours first, in the order of the batch. Rank r of N has the sequences r, r + N,
r + 2N, ...: what the ranks add together are then whole branches of that tree, for every N that is a
power of two.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ostro import kernels
from ostro.data.order.sequences import Batch
from ostro.distributed import World
from ostro.optim import gradient_norm
from ostro.parallel import Mesh
from ostro.runtime.phase import enter_phase
from ostro.trainer.backends.torch import Engine
from ostro.trainer.state import TrainState, split_like


class PairwiseSum:
    """Lists of tensors added pairwise, neighbours first, while they come in."""

    def __init__(self) -> None:
        self._branches: list[tuple[int, list[Tensor]]] = []  # (number of leaves, sum)

    def add(self, tensors: list[Tensor]) -> None:
        """Add the next leaf. The tensors may be changed."""
        count = 1
        while self._branches and self._branches[-1][0] == count:
            tensors = _added(self._branches.pop()[1], tensors)
            count *= 2
        self._branches.append((count, tensors))

    def total(self) -> list[Tensor]:
        """The sum of all leaves; starts anew."""
        branches, self._branches = self._branches, []
        _, total = branches.pop()
        while branches:
            total = _added(branches.pop()[1], total)
        return total


def _added(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    return [a.add_(b) for a, b in zip(first, second, strict=True)]


def pairwise_sum(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of tensors in the order of `PairwiseSum`."""
    tree = PairwiseSum()
    for tensor in tensors:
        tree.add([tensor])
    return tree.total()[0]


class _ReduceScatter:
    """FSDP2's reduce-scatter in a fixed order: exchange the parts, then add them pairwise."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        output_tensor.copy_(pairwise_sum(parts.chunk(group.size())))


class DeterministicEngine(Engine):
    """Bit-equal losses and weights for copies and for FSDP. Slow: a tool to find errors with.

    It runs on one thread, as sums inside of layers are cut differently for other numbers.
    """

    def __init__(self, state: TrainState, world: World, mesh: Mesh | None):
        super().__init__(state, world)
        torch.set_num_threads(1)
        kernels.enable(False)
        for group in state.optimizer.param_groups:
            # The fused kernel rounds the last elements of a tensor in another way than the others,
            # and which these are depends on how it is split.
            group.update(fused=False, foreach=True)
        self.is_collective = mesh is not None and mesh.is_split
        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(_ReduceScatter())  # pyright: ignore
        self._sum = PairwiseSum()
        self._num_rows = 0

    def backward(self, micro: Batch, num_targets: Tensor | int, *, is_last: bool) -> Tensor:
        """See `Engine.backward`."""
        state, world, total = self.state, self.world, torch.zeros((), device=self.state.device)
        for row in range(len(micro.tokens)):
            state.seed_dropout(state.step, self._num_rows * world.num_data_ranks + world.data_rank)
            self._num_rows += 1
            one = micro.rows(row, row + 1)
            scale = state.loss_scale / num_targets
            enter_phase("forward")
            loss = state.model(one.tokens, one.targets, segments=one.segments, scale=scale)
            enter_phase("backward")
            loss.backward()
            loss = loss.detach() / state.loss_scale
            total += loss
            self._sum.add([*self._take_gradients(), self._over_ranks(loss)])
        return total

    def _take_gradients(self) -> list[Tensor]:
        """The gradients of one sequence of every rank together; of FSDP's parts, which come so."""
        self.state.take_gradients()
        grads = []
        for name, parameter in self.state.parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            grads.append(parameter.grad)
            parameter.grad = None
        return grads if self.is_collective else [self._over_ranks(grad) for grad in grads]

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        if self.world.num_ranks == 1:
            return tensor
        parts = tensor.new_empty(self.world.num_ranks * tensor.numel())
        dist.all_gather_single(parts, tensor.reshape(-1))
        return pairwise_sum(parts.chunk(self.world.num_ranks)).view(tensor.shape)

    def update(
        self, loss: Tensor, learning_rate: float, max_grad_norm: float | None
    ) -> dict[str, Tensor]:
        """See `Engine.update`. The loss is taken from the tree."""
        state = self.state
        *grads, loss = self._sum.total()
        self._num_rows = 0
        whole = []
        for parameter, grad in zip(state.model.parameters(), grads, strict=True):
            if isinstance(parameter, DTensor):
                grad = split_like(parameter, grad).full_tensor()
            whole.append(grad)
        norm = gradient_norm(whole) / state.loss_scale
        for parameter, grad in zip(state.parameters.values(), grads, strict=True):
            parameter.grad = grad
        return self._finish(loss, norm, learning_rate, max_grad_norm)
