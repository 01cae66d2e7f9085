"""One update: gradient norm, clipping, masking of bad steps, float16 loss scale; no host syncs."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ostro import kernels


def gradient_norm(
    gradients: Iterable[Tensor | None],
    shares: Tensor | None = None,
    sum_: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The 2-norm of all gradients that are there, a scalar of at least float32 on their device.

    Where they are split over ranks, `sum_` adds a scalar of all ranks, and `shares` says of each
    gradient, on their device, how much of it counts here: 1 / the number of ranks that hold the
    same part. Does not wait for the device.
    """
    grads = [grad for grad in gradients if grad is not None]
    if not grads:
        return torch.zeros(())
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    norms = kernels.norms(grads)
    if norms is None:
        norms = torch.stack(torch._foreach_norm(grads, 2, dtype=dtype))
    if shares is None or sum_ is None:
        return torch.linalg.vector_norm(norms)
    return sum_((norms.square() * shares).sum()).sqrt()


def clip_scale(norm: Tensor, max_norm: float | None) -> Tensor:
    """What to divide the gradients by so that their norm is at most `max_norm` (null, 0: 1)."""
    return (norm / max_norm).clamp(min=1.0) if max_norm else torch.ones_like(norm)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The learning rate of the next step; groups may take a multiple of it, their `lr_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def apply_update(
    optimizer: torch.optim.Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Step the optimizer with its gradients divided by `grad_scale`, unless `found_inf` is set.

    Args:
        optimizer: what `OptimizerConfig.build` returned.
        grad_scale: scalar on the device, see `clip_scale`; None is 1.
        found_inf: scalar on the device, true or not 0 to leave weights, moments and step counts
            as they are; None is false.

    Gradients may be scaled in place. Fused optimizers read both on the device; others wait here.
    """
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    on_host = type(found_inf) is Tensor and found_inf.is_cpu  # and has a value: is not a fake one
    if found_inf is not None and (on_host or not is_fused):
        if bool(found_inf):  # waits for the device
            return
        found_inf = None
    if kernels.adamw(optimizer, grad_scale):
        return
    if not is_fused:
        if grad_scale is not None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            torch._foreach_div_([grad for grad in grads if grad is not None], grad_scale)
        optimizer.step()
        return
    optimizer.grad_scale = None if grad_scale is None else grad_scale.float()
    optimizer.found_inf = None if found_inf is None else (found_inf != 0).float()
    try:
        optimizer.step()
    finally:  # they belong to this step only
        del optimizer.grad_scale, optimizer.found_inf


class LossScaler:
    """Dynamic loss scale for float16 (arXiv:1710.03740), kept on the device.

    Multiply the loss by `scale` before the backward pass; the gradients are then `scale` times
    too large. The scale doubles after `growth_interval` good steps in a row and halves after each
    step whose gradients overflowed.
    """

    def __init__(
        self, device: torch.device | str, init_scale: float = 2.0**16, growth_interval: int = 2000
    ):
        self.scale = torch.tensor(init_scale, device=device)
        self.num_good = torch.zeros((), dtype=torch.int64, device=device)
        self.growth_interval = growth_interval

    @property
    def at_minimum(self) -> Tensor:
        """Boolean scalar: the scale is down to 1, so an overflow now is no matter of scale."""
        return self.scale <= 1.0

    def update(self, overflow: Tensor) -> None:
        """Adapt the scale to a step, by whether its gradients were not finite."""
        overflow = overflow != 0
        num_good = torch.where(overflow, 0, self.num_good + 1)
        grow = num_good >= self.growth_interval
        factor = torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale = (self.scale * factor).clamp(min=1.0)
        self.num_good = torch.where(grow, 0, num_good)

    def state_dict(self) -> dict[str, Tensor]:
        """Scale and count, for a checkpoint."""
        return {"scale": self.scale, "num_good": self.num_good}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take scale and count over."""
        self.scale = state["scale"].to(self.scale)
        self.num_good = state["num_good"].to(self.num_good)
