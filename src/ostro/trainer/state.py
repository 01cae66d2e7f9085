"""Everything that one update hands to the next, and what a checkpoint keeps of it."""

import hashlib
from collections.abc import Mapping
from math import inf, isfinite, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ostro.checkpoint import Saved, SavedFile, State, Stored, copy_into, whole
from ostro.core.errors import CheckpointError
from ostro.models.lm_model import LmModel
from ostro.nn.collectives import local
from ostro.optim import (
    LossScaler,
    SkipStep,
    has_state,
    make_state,
    optimizer_tensors,
    take_numbers,
)
from ostro.trainer.spikes import Recovery


class TrainState:
    """Model, optimizer, counters and guards of a run.

    The data position is `step`: batch n is a function of (seed, n). So is the random state of
    dropout, which is seeded anew from (seed, step, micro-batch) before every forward pass.
    """

    def __init__(
        self,
        model: LmModel,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        device: torch.device,
        skip_step: SkipStep | None = None,
        loss_scaler: LossScaler | None = None,
        crash_on_nan: bool = True,
        recovery: Recovery | None = None,
    ):
        self.model = model
        self.seed = seed
        self.device = device
        self.crash_on_nan = crash_on_nan
        self.parameters = dict(parameters)
        """What the optimizer works on: this rank's part of each parameter, by name."""
        self.num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        """Trained parameters, a shared one counted once, before any are split over ranks."""
        self.begin(optimizer, skip_step, loss_scaler, recovery or Recovery())

    def begin(
        self,
        optimizer: torch.optim.Optimizer,
        skip_step: SkipStep | None,
        loss_scaler: LossScaler | None,
        recovery: Recovery,
    ) -> None:
        """Before the first update, with an optimizer and guards that have seen nothing."""
        self.optimizer = optimizer
        self.skip_step = skip_step
        self.loss_scaler = loss_scaler
        self.recovery = recovery
        """Batches to leave out, and when to go back."""
        self.step = 0
        """Updates made so far, and the index of the next one."""
        self.best_eval_loss = inf
        """The lowest `eval/loss` so far."""
        self.eval_loss = nan
        """The last `eval/loss`."""
        self._halted = torch.zeros((), dtype=torch.bool, device=self.device)

    def seed_dropout(self, step: int, micro_batch: int, part: int = 0) -> None:
        """Make dropout of this micro-batch, or part of its sequences, a function of (seed, step,
        micro-batch, part).
        """
        text = f"{self.seed}/{step}/{micro_batch}" + (f"/{part}" if part else "")
        key = hashlib.blake2b(text.encode(), digest_size=8)
        # `torch.manual_seed` writes down its callers for CUDA, even where there is none.
        seed = (
            torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        )
        seed(int.from_bytes(key.digest(), "little") >> 1)

    @property
    def loss_scale(self) -> Tensor | float:
        """What the loss is multiplied with before the backward pass."""
        return 1.0 if self.loss_scaler is None else self.loss_scaler.scale

    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Whether to hold this update back (1.0) or make it (0.0), decided on the device.

        An update is held back when the loss or the gradient norm is not finite, when skip-step
        finds it an outlier, and after a divergence that stops the run. Returns that mask and
        the figures of the guards; `diverged` among them is 1.0 where the run should stop.
        """
        figures: dict[str, Tensor] = {}
        finite_loss, finite_norm = torch.isfinite(loss), torch.isfinite(norm)
        hold = diverged = ~(finite_loss & finite_norm)
        if self.loss_scaler is not None:
            # Too large a scale overflows the gradient alone; that lowers the scale, no more.
            diverged = ~finite_loss | (~finite_norm & self.loss_scaler.at_minimum)
            figures["optim/loss_scale"] = self.loss_scaler.scale
            self.loss_scaler.update(hold)
        if self.skip_step is not None:
            # What comes after a divergence is not part of the run: NaN stays out of the window.
            skip, skip_figures = self.skip_step.update(loss.masked_fill(self._halted, nan), norm)
            figures |= skip_figures
            hold = hold | skip
        if self.crash_on_nan:
            self._halted = self._halted | diverged
        figures["diverged"] = diverged
        return (hold | self._halted).float(), figures

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, by group: `model`, `optimizer`, `state`. Not copies."""
        self.reshard()
        state = {"random.torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        for prefix, guard in self._guards().items():
            state |= {f"{prefix}.{name}": value for name, value in guard.state_dict().items()}
        return {
            "model": {name: p.detach() for name, p in self.model.named_parameters()},
            "optimizer": self._optimizer_tensors(),
            "state": state,
        }

    def reshard(self) -> None:
        """Split what an evaluation leaves whole: the outermost parameters."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors; those of a split parameter are split as it is."""
        found = optimizer_tensors(self.optimizer, self.parameters)
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor):
                for key in self.optimizer.state.get(self.parameters[name], {}):
                    own = found.get(f"{name}.{key}")
                    if own is not None and own.shape == self.parameters[name].shape:
                        found[f"{name}.{key}"] = split_like(parameter, own)
        return found

    def take_gradients(self) -> None:
        """Hand the gradients of split parameters to the parts that the optimizer works on."""
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor):
                grad = parameter.grad
                self.parameters[name].grad = None if grad is None else grad.to_local()
                parameter.grad = None

    def values(self) -> dict[str, Any]:
        """The numbers of a checkpoint that are not tensors."""
        losses = {"best_eval_loss": self.best_eval_loss, "eval_loss": self.eval_loss}
        known = {name: loss if isfinite(loss) else None for name, loss in losses.items()}
        return {"step": self.step, **known, "recover": self.recovery.state_dict()}

    def load(self, saved: Saved | SavedFile) -> None:
        """Take over the state of a checkpoint; `CheckpointError` when it does not fit."""
        stored = {what: saved.stored(what) for what in ("model", "optimizer")}
        if stored["optimizer"] and not has_state(self.optimizer):
            make_state(self.optimizer)
        own = self.tensors()
        for what, source in stored.items():
            _copy(source, own[what], str(saved), what)
        take_numbers(self.optimizer, self.parameters, own["optimizer"])
        self._load_rest(saved.tensors("state"), saved.values)

    def restore(self, snapshot: State) -> None:
        """Take over a copy that was made of this very state."""
        if not snapshot.tensors["optimizer"]:  # of before the first step, which makes the state
            self.optimizer.state.clear()
        own = self.tensors()
        for what in ("model", "optimizer"):
            for name, target in own[what].items():
                local(target).copy_(local(snapshot.tensors[what][name]))
        take_numbers(self.optimizer, self.parameters, own["optimizer"])
        self._load_rest(snapshot.tensors["state"], snapshot.values)

    def _load_rest(self, state: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        for prefix, guard in self._guards().items():
            own = {
                n.removeprefix(f"{prefix}."): t for n, t in state.items() if n.startswith(prefix)
            }
            if own:  # a guard that was switched on since starts afresh
                guard.load_state_dict({name: value.to(self.device) for name, value in own.items()})
        if "random.torch" in state:
            torch.set_rng_state(state["random.torch"])
        if "random.cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random.cuda"], self.device)
        self.load_values(values)

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take over the numbers of a checkpoint."""
        self.step = int(values["step"])
        best = values.get("best_eval_loss")
        self.best_eval_loss = inf if best is None else float(best)
        last = values.get("eval_loss")
        self.eval_loss = nan if last is None else float(last)
        if "recover" in values:
            self.recovery.load_state_dict(values["recover"])
        self._halted.zero_()

    def _guards(self) -> dict[str, SkipStep | LossScaler]:
        guards = {"skip_step": self.skip_step, "loss_scaler": self.loss_scaler}
        return {name: guard for name, guard in guards.items() if guard is not None}


def split_like(parameter: DTensor, part: Tensor) -> DTensor:
    """This rank's part of a tensor that is split as a parameter is. No communication."""
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, placements, shape=shape, stride=stride)


def load_weights(model: LmModel, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy `weights` into `model` by name; `CheckpointError` lists what does not fit."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    _copy(whole(weights), named, where, "model")


def _copy(
    source: Mapping[str, Stored], target: Mapping[str, Tensor], where: str, what: str
) -> None:
    wrong = [f"{name} is missing" for name in target if name not in source]
    wrong += [f"{name} is unknown here" for name in source if name not in target]
    wrong += [
        f"{name} has shape {tuple(source[name].shape)}, here it is {tuple(own.shape)}"
        for name, own in target.items()
        if name in source and source[name].shape != own.shape
    ]
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(
            f"{where} does not fit this run's {what}: {shown} - use the settings it was saved with"
            " (they are in its config.yaml), or start a run with another trainer.id"
        )
    copy_into(target, source)
