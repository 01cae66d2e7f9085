"""OptimizerConfig: learning-rate schedule, weight decay and clipping of any optimizer; AdamW."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ostro.config import Choice
from ostro.core.axes import ParameterAxes
from ostro.core.errors import ConfigError, Problem
from ostro.core.units import resolve_steps
from ostro.optim.schedule import (
    CosineSchedule,
    LrScheduleConfig,
    Schedule,
    cycle_boundaries,
    make_schedule,
)
from ostro.optim.skip_step import SkipStepConfig

NamedParameters = Mapping[str, tuple[nn.Parameter, ParameterAxes]]
"""Full parameter name -> the parameter and what its dims mean."""


@dataclass(frozen=True)
class OptimizerConfig(Choice, ABC):
    """What all optimizers share. The learning rate runs through cycles of (re)warm-up, stable
    and decay phases; lengths are an integer number of steps or a fraction of their cycle.
    """

    default_type: ClassVar[str | None] = "adam"
    needs_matrices: ClassVar[bool] = False
    """True where the update of part of a matrix is not that part of its update."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay: each update takes `learning rate * weight_decay` of the weight."""
    min_lr_ratio: float = 0.1
    """Every cycle decays to `min_lr_ratio * learning_rate`."""
    warmup: int | float = 0.01
    """Linear climb from 0 in the first cycle: steps, or a fraction of the cycle. `1` is one step,
    `1.0` the whole cycle."""
    decay: int | float | None = None
    """Length of each cycle's decay: steps, or a fraction of the cycle; null = all that the
    warm-up leaves (with `lr_schedule: wsd` 0.2). What neither takes is spent at the peak, between
    them."""
    rewarmup: int | float = 0.0
    """Climb from the previous cycle's end back to the peak, in all cycles but the first; 0 jumps
    to the peak."""
    cycles: int | list[int] | None = None
    """Number of equal cycles, or the increasing list of steps at which cycles end; null = one."""
    cycle_length: int | float | list[int] | None = None
    """Length of the cycles: steps, a fraction of the run, or a list of lengths in steps. The last
    cycle takes what is left. Not together with `cycles`."""
    lr_schedule: LrScheduleConfig = field(default_factory=CosineSchedule)
    """Shape of the decay: constant, linear, cosine, inv_sqrt, inv or wsd, or a mapping such as
    `{type: inv_sqrt, timescale: 2000}`. wsd is linear, and takes the last fifth of the cycle where
    `decay` is null."""
    warmup_offset: Literal[0, 1] = 0
    """0: the first update has learning rate 0. 1: it has peak / (warmup + 1), as in nanoGPT, and a
    warm-up longer than the schedule is not cut to it."""
    schedule_steps: int | None = None
    """Steps that the schedule is laid out for; null = the steps of the run. A longer run stays at
    the end of the last phase, a shorter one never gets there."""
    weight_decay_modules: str | list[str] | None = None
    """Which parameters decay: a regular expression matched from the start of their name, or a
    list of which one must occur in it; null = those of the default mask."""
    default_weight_decay_mask: bool | None = None
    """The default mask: true adds it to `weight_decay_modules`, false lets everything decay;
    null = it decides if `weight_decay_modules` is null."""
    decay_mask: Literal["matrices", "all_2d"] = "matrices"
    """The default mask. matrices: all weights that multiply activations, so no bias, norm or
    embedding. all_2d: embeddings too, as in nanoGPT."""
    max_grad_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it; null or 0 = no clipping."""
    skip_bad_steps: bool | int | SkipStepConfig = False
    """Skip updates whose loss or gradient norm is far above the recent ones: true, the number of
    steps to compare with, or a mapping; false or 0 = never."""

    @abstractmethod
    def build(
        self, parameters: NamedParameters, split: Mapping[str, Tensor] | None = None
    ) -> torch.optim.Optimizer:
        """The optimizer over these parameters, with its state allocated, in groups of what decays
        and what does not. `set_learning_rate` comes before each step.

        `split`: the DTensors that some of the parameters are this rank's part of.
        """

    def problems(self) -> Iterator[Problem]:
        """What is wrong whatever the length of the run."""
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                yield Problem(name, "must be finite and not negative")
        if not 0 <= self.min_lr_ratio <= 1:
            yield Problem("min_lr_ratio", "must be between 0 and 1")
        elif self.min_lr_ratio == 0 and self.lr_schedule.needs_minimum:
            name = LrScheduleConfig.get_choice_name(type(self.lr_schedule))
            yield Problem(
                "min_lr_ratio", f"must be above 0 with lr_schedule {name}", "0.01, for example"
            )
        for name in ("warmup", "decay", "rewarmup"):
            yield from _step_problems(name, getattr(self, name))
        if self.schedule_steps is not None and self.schedule_steps < 1:
            yield Problem("schedule_steps", "must be at least 1, or null")
        yield from self._cycle_problems()
        if isinstance(self.weight_decay_modules, str):
            try:
                re.compile(self.weight_decay_modules)
            except re.error as error:
                yield Problem("weight_decay_modules", f"is no regular expression: {error}")
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            yield Problem("max_grad_norm", "must not be negative", "null turns clipping off")
        # A SkipStepConfig checks itself.
        if not isinstance(self.skip_bad_steps, SkipStepConfig) and self.skip_step:
            for problem in self.skip_step.problems():
                yield Problem("skip_bad_steps", problem.rule)

    def _cycle_problems(self) -> Iterator[Problem]:
        cycles, length = self.cycles, self.cycle_length
        if cycles is not None and length is not None:
            yield Problem(
                "cycle_length", "cannot be given together with cycles", "drop one of them"
            )
        if isinstance(cycles, list):
            if any(step <= 0 for step in cycles) or any(a >= b for a, b in pairwise(cycles)):
                yield Problem("cycles", "must be increasing steps above 0")
        elif cycles is not None and cycles < 1:
            yield Problem("cycles", "must be at least 1")
        if isinstance(length, list):
            if any(steps <= 0 for steps in length):
                yield Problem("cycle_length", "must be lengths above 0")
        elif length is not None:
            found = list(_step_problems("cycle_length", length))
            yield from found or [Problem("cycle_length", "must be above 0")] * (length == 0)

    def problems_for(self, num_train_steps: int) -> Iterator[Problem]:
        """What is wrong with cycles that `problems` accepts, in a run of so many steps."""
        num_steps = self.schedule_steps or num_train_steps
        cycles, length = self.cycles, self.cycle_length
        rule = f"the schedule has only {num_steps} steps"
        if isinstance(cycles, list):
            if cycles and cycles[-1] > num_steps:
                yield Problem("cycles", f"{rule}, the list goes to {cycles[-1]}")
        elif cycles is not None and cycles > num_steps:
            yield Problem("cycles", rule)
        if isinstance(length, list):
            if sum(length) > num_steps:
                yield Problem("cycle_length", f"{rule}, the lengths add up to {sum(length)}")
        elif isinstance(length, float) and 0 < length < 1 and not resolve_steps(length, num_steps):
            yield Problem("cycle_length", f"is less than one step: {rule}")

    def schedule(self, num_train_steps: int) -> Schedule:
        """The learning rate of every step of a run of so many steps; `ConfigError` if the cycles
        do not fit it.
        """
        assert num_train_steps >= 1, f"a run of {num_train_steps} steps"
        if found := [*self.problems(), *self.problems_for(num_train_steps)]:
            raise ConfigError(found)
        num_steps = self.schedule_steps or num_train_steps
        return make_schedule(
            cycle_boundaries(self.cycles, self.cycle_length, num_steps),
            peak=self.learning_rate,
            minimum=self.learning_rate * self.min_lr_ratio,
            shape=self.lr_schedule,
            warmup=self.warmup,
            decay=self.lr_schedule.default_decay if self.decay is None else self.decay,
            rewarmup=self.rewarmup,
            warmup_offset=self.warmup_offset,
        )

    @property
    def skip_step(self) -> SkipStepConfig | None:
        """`skip_bad_steps` in one form; None where it is off."""
        skip = self.skip_bad_steps
        if isinstance(skip, SkipStepConfig):
            return skip
        if skip is True:
            return SkipStepConfig()
        return SkipStepConfig(rolling_interval_length=skip) if skip else None

    def decays(self, name: str, axes: ParameterAxes) -> bool:
        """Whether weight decay applies to the parameter of this name."""
        modules = self.weight_decay_modules
        if modules is None and self.default_weight_decay_mask is False:
            return True
        default = axes.is_matrix if self.decay_mask == "matrices" else bool(axes.ins)
        if modules is None:
            return default
        if isinstance(modules, str):
            named = re.match(modules, name) is not None
        else:
            named = any(part in name for part in modules)
        return named or (default and self.default_weight_decay_mask is True)


@OptimizerConfig.register_subclass("adam")
@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    """AdamW: Adam (arXiv:1412.6980) with decoupled weight decay (arXiv:1711.05101)."""

    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the squared gradients, after bias correction."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong whatever the length of the run."""
        yield from super().problems()
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield Problem(name, "must be at least 0 and below 1")
        if not 0 <= self.epsilon < float("inf"):
            yield Problem("epsilon", "must be finite and not negative")

    def build(
        self, parameters: NamedParameters, split: Mapping[str, Tensor] | None = None
    ) -> torch.optim.Optimizer:
        """`torch.optim.AdamW`, in the groups `decaying`, `not decaying`."""
        return adamw(self, parameter_groups(self, parameters))


def adamw(config: Any, groups: list[dict]) -> torch.optim.AdamW:
    """`torch.optim.AdamW` with the settings of an `AdamConfig`, fused where the device can."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        # The fused kernel reads clip scale and skip mask on the device: no wait for the host.
        fused=devices <= {"cpu", "cuda"} or None,
    )
    # The state that the first step would make, now: a checkpoint can be read into it.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step_device = parameter.device if group["fused"] else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=step_device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def parameter_groups(config: OptimizerConfig, parameters: NamedParameters) -> list[dict]:
    """The groups `decaying`, `not decaying`, each in the order of `parameters`.

    `ConfigError` if `weight_decay_modules` fits no parameter: it is a slip, not a wish.
    """
    decays = {name: config.decays(name, axes) for name, (_, axes) in parameters.items()}
    if config.weight_decay_modules and not any(decays.values()):
        examples = ", ".join(list(parameters)[:3])
        raise ConfigError(
            Problem(
                "optimizer.weight_decay_modules",
                "fits no parameter",
                f"names look like {examples}",
                value=str(config.weight_decay_modules),
            )
        )
    return [
        {
            "params": [parameters[name][0] for name in parameters if decays[name] == decaying],
            "weight_decay": config.weight_decay if decaying else 0.0,
        }
        for decaying in (True, False)
    ]


def _step_problems(name: str, value: int | float | None) -> Iterator[Problem]:
    if value is None:
        return
    try:
        resolve_steps(value, 1)
    except (ValueError, OverflowError) as error:
        yield Problem(name, str(error))
