"""Rotary position embeddings (Su et al. 2021) and the scalings that stretch them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ostro import kernels
from ostro.config import Choice
from ostro.core.errors import Problem


@dataclass(frozen=True)
class RotaryConfig(Choice):
    """How positions turn the queries and keys; `type` picks the scaling of frequencies."""

    default_type: ClassVar[str | None] = "default"

    theta: float = 10000.0
    """Base of the geometric series of wavelengths."""
    factor: float = 1.0
    """How many times longer than in the first training sequences may be: frequencies are divided
    by it, and 1 leaves them."""

    def frequencies(self, head_size: int) -> tuple[Tensor, float]:
        """Angle per position of each pair of dims, (head_size / 2,); factor on cos and sin."""
        return self._base(head_size) / self.factor, 1.0

    def _base(self, head_size: int) -> Tensor:
        dims = torch.arange(0, head_size, 2, device="cpu").float()
        return 1.0 / self.theta ** (dims / head_size)

    def tables(self, positions: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        """float32 cos and sin for int positions (...), each (..., head_size / 2)."""
        frequencies, factor = self.frequencies(head_size)
        angles = positions[..., None].float() * frequencies.to(positions.device)
        return angles.cos() * factor, angles.sin() * factor

    def problems(self) -> Iterator[Problem]:
        """Rules that every scaling shares."""
        if self.theta <= 0:
            yield Problem("theta", "must be positive")
        if self.factor <= 0:
            yield Problem("factor", "must be positive")


@RotaryConfig.register_subclass("default")
@dataclass(frozen=True)
class DefaultRotaryConfig(RotaryConfig):
    """Frequencies as in the paper, without scaling unless a factor is given."""


@RotaryConfig.register_subclass("linear")
@dataclass(frozen=True)
class LinearRotaryConfig(RotaryConfig):
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""


@RotaryConfig.register_subclass("llama3")
@dataclass(frozen=True)
class Llama3RotaryConfig(RotaryConfig):
    """Llama 3: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    theta: float = 500000.0
    """Base of the geometric series of wavelengths."""
    factor: float = 8.0
    """Divisor of the low frequencies."""
    low_freq_factor: float = 1.0
    """Wavelengths above `original_max_position_embeddings` / this are scaled fully."""
    high_freq_factor: float = 4.0
    """Wavelengths below `original_max_position_embeddings` / this are kept."""
    original_max_position_embeddings: int = 8192
    """Sequence length in tokens of the first training."""

    def frequencies(self, head_size: int) -> tuple[Tensor, float]:
        """See `RotaryConfig.frequencies`."""
        base = self._base(head_size)
        turns = self.original_max_position_embeddings * base / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return (1 - kept) * base / self.factor + kept * base, 1.0

    def problems(self) -> Iterator[Problem]:
        """Rules of this scaling."""
        yield from super().problems()
        if self.high_freq_factor <= self.low_freq_factor:
            yield Problem("high_freq_factor", "must be above low_freq_factor")
        if self.original_max_position_embeddings <= 0:
            yield Problem("original_max_position_embeddings", "must be positive")


@RotaryConfig.register_subclass("yarn")
@dataclass(frozen=True)
class YarnRotaryConfig(RotaryConfig):
    """YaRN (Peng et al. 2023): a ramp over dims, and cos and sin scaled with the factor's log."""

    beta_fast: float = 32.0
    """Dims that turn more often than this over the original length are kept."""
    beta_slow: float = 1.0
    """Dims that turn less often than this over the original length are scaled fully."""
    original_max_position_embeddings: int = 2048
    """Sequence length in tokens of the first training."""
    attention_factor: float | None = None
    """Factor on cos and sin. Null: 0.1 ln(factor) + 1."""

    def frequencies(self, head_size: int) -> tuple[Tensor, float]:
        """See `RotaryConfig.frequencies`."""
        base = self._base(head_size)

        def dim_of(turns: float) -> float:
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_size * math.log(wavelength) / (2 * math.log(self.theta))

        low = max(math.floor(dim_of(self.beta_fast)), 0)
        high = min(math.ceil(dim_of(self.beta_slow)), head_size - 1)
        span = high - low if high != low else 0.001
        scaled = ((torch.arange(head_size // 2, device="cpu").float() - low) / span).clamp(0, 1)
        factor = self.attention_factor
        if factor is None:
            factor = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return base / self.factor * scaled + base * (1 - scaled), factor

    def problems(self) -> Iterator[Problem]:
        """Rules of this scaling."""
        yield from super().problems()
        if self.beta_fast <= self.beta_slow:
            yield Problem("beta_fast", "must be above beta_slow")
        if self.original_max_position_embeddings <= 0:
            yield Problem("original_max_position_embeddings", "must be positive")


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dim i against dim i + head_size / 2. x is (..., head_size), cos and sin broadcast."""
    first, second = x.chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(x.dtype)


def turn_fused(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary` to all but the values of (batch, position, kv_heads, group + 2, head_size)."""
    found = kernels.rotary(qkv, cos, sin)
    if found is not None:
        return found
    turned = apply_rotary(qkv[:, :, :, :-1], cos, sin)
    return torch.cat((turned, qkv[:, :, :, -1:]), 3)
