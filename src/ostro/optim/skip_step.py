"""SkipStep: leave out updates whose loss or gradient norm is far above the recent ones."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ostro.core.errors import Problem

_MIN_DEVIATION = 1e-6


@dataclass(frozen=True)
class SkipStepConfig:
    """Skip an update whose loss or gradient norm exceeds mean + sigma_factor * deviation."""

    rolling_interval_length: int = 128
    """Number of past steps to compare with. Nothing is skipped before half of them are seen."""
    sigma_factor: float = 6.0
    """How many (population) standard deviations above the mean is too far."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the two numbers."""
        if self.rolling_interval_length < 2:
            yield Problem("rolling_interval_length", "must be at least 2 steps")
        if not self.sigma_factor > 0:
            yield Problem("sigma_factor", "must be above 0")

    def build(self, device: torch.device | str) -> "SkipStep":
        """An empty window on the device."""
        return SkipStep(self, torch.device(device))


class SkipStep:
    """The window of past losses and gradient norms, and the decision; all of it on the device."""

    def __init__(self, config: SkipStepConfig, device: torch.device):
        self.config = config
        num_steps = config.rolling_interval_length
        self.losses = torch.zeros(num_steps, device=device)
        self.grad_norms = torch.zeros(num_steps, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        """Number of steps that entered the window since the start."""

    def update(self, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare a step with those before it, then take it into the window.

        Args:
            loss: mean loss of the step, a scalar on the device.
            grad_norm: norm of the whole gradient before clipping, likewise.

        Returns:
            A boolean scalar, whether to skip the update, and the figures to log; none of it waits
            for the device. A step with a value that is not finite is skipped and never enters the
            window; other skipped steps enter it.
        """
        loss, grad_norm = loss.detach().float(), grad_norm.detach().float()
        positions = torch.arange(len(self.losses), device=self.losses.device)
        num_seen = self.count.clamp(max=len(positions))
        seen = positions < num_seen
        loss_std, loss_threshold = self._threshold(self.losses, seen, num_seen)
        norm_std, norm_threshold = self._threshold(self.grad_norms, seen, num_seen)
        finite = loss.isfinite() & grad_norm.isfinite()
        skip = ~finite | (loss > loss_threshold) | (grad_norm > norm_threshold)

        here = finite & (positions == self.count % len(positions))
        self.losses = torch.where(here, loss, self.losses)
        self.grad_norms = torch.where(here, grad_norm, self.grad_norms)
        self.count = self.count + finite
        return skip, {
            "optim/skipped_step": skip.float(),
            "optim/skip_step/loss": loss,
            "optim/skip_step/loss_threshold": loss_threshold,
            "optim/skip_step/loss_std": loss_std,
            "optim/skip_step/grad_norm": grad_norm,
            "optim/skip_step/grad_norm_threshold": norm_threshold,
            "optim/skip_step/grad_norm_std": norm_std,
        }

    def _threshold(self, values: Tensor, seen: Tensor, num_seen: Tensor) -> tuple[Tensor, Tensor]:
        """Deviation of the values seen, and the limit: infinite until there are enough of them."""
        divisor = num_seen.clamp(min=1)
        mean = values.sum() / divisor  # places not seen hold 0
        variance = torch.where(seen, (values - mean) ** 2, 0.0).sum() / divisor
        deviation = variance.sqrt().clamp(min=_MIN_DEVIATION)
        enough = num_seen >= max(2, len(values) // 2)
        limit = torch.where(enough, mean + self.config.sigma_factor * deviation, torch.inf)
        return deviation, limit

    def state_dict(self) -> dict[str, Tensor]:
        """The window, for a checkpoint."""
        return {"losses": self.losses, "grad_norms": self.grad_norms, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a window over. Of one with another length, the newest steps that fit are kept."""
        saved = {name: value.to(self.losses.device) for name, value in state.items()}
        num_saved, num_steps = len(saved["losses"]), len(self.losses)
        if num_saved != num_steps:
            count = int(saved["count"])
            kept = min(count, num_saved, num_steps)
            newest = [step % num_saved for step in range(count - kept, count)]
            for name in ("losses", "grad_norms"):
                values = torch.zeros(num_steps, device=self.losses.device)
                values[:kept] = saved[name][newest]
                saved[name] = values
            saved["count"] = torch.full_like(saved["count"], kept)
        self.losses, self.grad_norms = saved["losses"].clone(), saved["grad_norms"].clone()
        self.count = saved["count"].clone()
