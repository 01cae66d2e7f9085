"""A callback of your own: logs the norm of all weights."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from ostro.tracker import RunInfo
from ostro.trainer import Callback, CallbackConfig, StepInfo, Trainer


@CallbackConfig.register_subclass("weight_norm")
@dataclass(frozen=True)
class WeightNormConfig(CallbackConfig):
    """Logs `weights/norm`."""

    every: int = 10
    """Steps between two figures."""

    def build(self, run: RunInfo) -> Callback:
        return WeightNorm(self.every)


class WeightNorm(Callback):
    """Only what is needed is overridden; see `ostro.trainer.Callback` for the rest."""

    def __init__(self, every: int):
        self._every = every

    def after_step(self, trainer: Trainer, info: StepInfo) -> None:
        if info.step % self._every and not info.is_last:
            return
        norms = []
        for weight in trainer.state.model.parameters():
            # With FSDP a rank holds a shard: all ranks come here, and put the weight together.
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            norms.append(torch.linalg.vector_norm(whole.detach().float()))
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()  # waits for the device
        trainer.tracker.log({"weights/norm": norm}, step=info.step)
