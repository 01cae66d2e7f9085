"""How gradients are made and weights updated: the part of a step that differs between backends."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ostro.checkpoint import Saved, SavedFile
from ostro.core.errors import CheckpointError
from ostro.data.order.sequences import Batch
from ostro.distributed import World
from ostro.nn.loss import keep_memory
from ostro.optim import apply_update, clip_scale, gradient_norm, set_learning_rate
from ostro.parallel import Mesh
from ostro.runtime.phase import enter_phase
from ostro.trainer.state import TrainState


class Engine(ABC):
    """Makes gradients of micro-batches and updates the weights of a `TrainState` with them.

    The loss and the gradient are means over the target tokens of the whole batch, on all ranks
    and in all micro-batches. Nothing waits for the device unless a backend says so.
    """

    is_collective: bool = False
    """Whether all ranks together have to call the model, and to make what a checkpoint holds."""

    def __init__(self, state: TrainState, world: World):
        self.state = state
        self.world = world
        self.before_update: Callable[[], None] = lambda: None
        """Called when all figures of an update are there, and the state is about to change."""

    def count_targets(self, batch: Batch) -> Tensor | int:
        """Target tokens of the batch on all ranks, at least 1."""
        count = int((batch.targets >= 0).sum())  # still on the host
        if self.world.num_ranks == 1:
            return max(count, 1)
        if self.world.context_rank:  # the others have the same targets
            count = 0
        return self.world.sum(torch.tensor(count, device=self.state.device)).clamp(min=1)

    @abstractmethod
    def backward(self, micro: Batch, num_targets: Tensor | int, *, is_last: bool) -> Tensor:
        """Add the gradient of a micro-batch; returns its part of the batch's mean loss.

        `is_last`: the last micro-batch before `update`; gradients may be shared between ranks now.
        """

    @abstractmethod
    def update(
        self, loss: Tensor, learning_rate: float, max_grad_norm: float | None
    ) -> dict[str, Tensor]:
        """Update the weights, unless the guards hold it back, and forget the gradients.

        `loss` is the sum of this rank's parts. Returns figures as device scalars, `train/loss`,
        `grad/norm/total` and `diverged` among them.
        """

    def _finish(
        self, loss: Tensor, norm: Tensor, learning_rate: float, max_grad_norm: float | None
    ) -> dict[str, Tensor]:
        """Step the optimizer with gradients of this norm, unless the guards hold it back."""
        self.before_update()
        state, scale = self.state, self.state.loss_scale  # the guards may change the scale
        hold, figures = state.judge(loss, norm)
        set_learning_rate(state.optimizer, learning_rate)
        clip = clip_scale(norm, max_grad_norm)
        apply_update(state.optimizer, grad_scale=clip * scale, found_inf=hold)
        keep_memory(state.parameters.values())
        state.optimizer.zero_grad(set_to_none=True)
        return {"train/loss": loss, "grad/norm/total": norm} | figures

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, by group; the weights are `model`.

        What is split over ranks is a DTensor; all else is taken from the first rank that has it.
        """
        return self.state.tensors()

    def values(self) -> dict[str, Any]:
        """The numbers of a checkpoint that are not tensors."""
        return self.state.values()

    def write_shards(self, folder: Path) -> dict[str, Path]:
        """Write below `folder` what a backend keeps in files of its own; folders by name."""
        return {}

    def load(self, saved: Saved | SavedFile) -> None:
        """Take over the state of a checkpoint; `CheckpointError` when it does not fit."""
        if "deepspeed" in saved.values:
            raise CheckpointError(
                f"{saved} - was saved by DeepSpeed, which keeps the optimizer state in a form of"
                " its own - set trainer.deepspeed as its config.yaml does, or start a run with"
                " another trainer.id"
            )
        fault = None
        try:
            self.state.load(saved)
        except CheckpointError as error:
            fault = error
        for error in self.world.gather(fault):  # of any rank, on all of them
            if error is not None:
                raise error


class TorchEngine(Engine):
    """torch's own: autograd, one optimizer, and between ranks FSDP2 or DistributedDataParallel.

    The model comes split as the mapping says; where nothing is split, ranks hold copies and
    DistributedDataParallel averages their gradients.
    """

    def __init__(self, state: TrainState, world: World, mesh: Mesh | None):
        super().__init__(state, world)
        self.model: torch.nn.Module = state.model
        self._shares: Tensor | None = None
        if mesh is not None and mesh.is_split:
            self.is_collective = True
            shares = [_share(p, world.num_ranks) for p in state.model.parameters()]
            self._shares = torch.tensor(shares, device=state.device)
        elif mesh is not None:
            self.model = DistributedDataParallel(
                state.model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )

    def backward(self, micro: Batch, num_targets: Tensor | int, *, is_last: bool) -> Tensor:
        """See `Engine.backward`."""
        # DistributedDataParallel divides by the number of ranks: the loss is multiplied with it.
        is_copied = isinstance(self.model, DistributedDataParallel)
        scale = self.state.loss_scale * (self.world.num_ranks if is_copied else 1)
        # FSDP shares the gradients of every micro-batch: keeping them whole would take the memory
        # that it saves.
        enter_phase("forward")
        with self._unshared() if not is_last else contextlib.nullcontext():
            loss = self.model(
                micro.tokens, micro.targets, segments=micro.segments, scale=scale / num_targets
            )
            enter_phase("backward")
            loss.backward()
        return loss.detach() / scale

    def _unshared(self) -> contextlib.AbstractContextManager[None]:
        shared = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if shared else contextlib.nullcontext()

    def update(
        self, loss: Tensor, learning_rate: float, max_grad_norm: float | None
    ) -> dict[str, Tensor]:
        """See `Engine.update`."""
        state = self.state
        loss = self.world.sum(loss)
        scale = state.loss_scale
        if self._shares is not None:
            state.take_gradients()
        grads = (p.grad for p in state.parameters.values())
        norm = gradient_norm(grads, self._shares, self.world.sum_all) / scale
        return self._finish(loss, norm, learning_rate, max_grad_norm)


def _share(parameter: Tensor, num_ranks: int) -> float:
    """1 / the number of ranks that hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return 1 / num_ranks
    mesh = parameter.device_mesh
    parts = [mesh.size(i) for i, at in enumerate(parameter.placements) if not at.is_replicate()]
    return prod(parts) / num_ranks
