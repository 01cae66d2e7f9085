"""What an optimizer remembers of its parameters, as a checkpoint keeps it.

Ours make their state when they are built. torch's, and most others, make it at their first step:
before a checkpoint is read into such a one it takes a step that counts for nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ostro.core.errors import ConfigError, Problem
from ostro.optim.config import NamedParameters, OptimizerConfig


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's own tensors under `<parameter name>.<what>`, for checkpoints: to be read,
    or written in place. Numbers come as tensors of their own; see `take_numbers`.
    """
    found = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}.{key}"] = value
            elif isinstance(value, int | float):
                dtype = torch.float64 if isinstance(value, float) else torch.int64
                found[f"{name}.{key}"] = torch.tensor(value, dtype=dtype, device="cpu")
    return found


def take_numbers(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Take over the numbers among what `optimizer_tensors` returned, after it was written to."""
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, int | float):
                state[key] = type(value)(tensors[f"{name}.{key}"].item())


def has_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has made its state."""
    return all(optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make its state, by a step with gradients of 0 at a learning rate of 0.

    State and weights are to be overwritten then: weights may differ in the sign of a zero.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def require_resumable(config: OptimizerConfig, parameters: NamedParameters) -> None:
    """`ConfigError` for an optimizer that keeps what no checkpoint would hold.

    Two steps are tried, on a copy of the smallest parameter of each number of dims.
    """
    few: dict[int, tuple[str, Any]] = {}
    for name, (parameter, axes) in sorted(parameters.items(), key=lambda item: item[1][0].numel()):
        if parameter.numel():
            copy = nn.Parameter(parameter.detach().clone())
            few.setdefault(parameter.ndim, (name, (copy, axes)))
    trial = replace(config, weight_decay_modules=None).build(dict(few.values()))
    before = {}
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            before = _beside(trial)
            for _, (parameter, _) in few.values():
                parameter.grad = torch.ones_like(parameter)
            try:
                trial.step()
            except Exception as error:  # whatever a user's own raises is the reason to show
                raise _refused(f"its step fails: {type(error).__name__}: {error}") from error
    changed = [name for name, value in _beside(trial).items() if before.get(name) != value]
    if changed:
        raise _refused(f"it keeps {', '.join(changed)} outside of the state of its parameters")
    for state in trial.state.values():
        for key, value in state.items():
            if value is not None and not isinstance(value, Tensor | int | float):
                raise _refused(f"it keeps a {type(value).__name__} in state[{key!r}]")


def _beside(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What it keeps beside its state, but for the parameters and the learning rate."""
    groups = {
        f"param_groups[{number}][{key!r}]": repr(value)
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key not in ("params", "lr")
    }
    own = {
        key: repr(value)
        for key, value in vars(optimizer).items()
        if isinstance(value, int | float | Tensor) and not key.startswith("_")
    }
    return groups | own


def _refused(what: str) -> ConfigError:
    advice = "keep tensors and numbers in self.state[parameter], and nothing else that changes"
    return ConfigError(Problem("optimizer.type", f"a run could not be resumed: {what}", advice))
