"""How fast a run is against the limit of its device.

The limit is the published dense peak of devices we know, and everywhere else a matrix product
timed on the device itself, so that a fraction of peak never means somebody else's hardware.
"""

import logging
import math
import time
from dataclasses import dataclass, field

import torch

log = logging.getLogger("ostro")

_MIN_TIMINGS = 8
# Dense matrix-product peaks of both 16-bit types in operations per second, from the vendors'
# data sheets.
_PUBLISHED_PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class DevicePeak:
    """The most operations per second a device can do, and how we know."""

    kind: str
    """Name of the device."""
    flops: float
    """Floating-point operations per second of one device."""
    source: str
    """`published` or `measured`."""


def device_peak(device: torch.device, dtype: torch.dtype) -> DevicePeak:
    """The peak of `device` for matrix products of `dtype`."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for name, flops in _PUBLISHED_PEAKS.items():
        if device.type == "cuda" and name in kind and dtype in (torch.bfloat16, torch.float16):
            return DevicePeak(kind, flops, "published")
    return DevicePeak(kind, measure_peak(device, dtype), "measured")


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Operations per second of a square matrix product, the best of several short timings.

    Waits for the device after each product. About `seconds` long, or as long as it takes to time a
    few, for on a busy machine the first ones may tell nothing.
    """
    size = 1024 if device.type == "cpu" else 8192
    if _time_products(device, dtype, size // 4, 0.0) * 4**3 > seconds:
        size //= 4  # of a type that the device has no instructions for
    return 2 * size**3 / _time_products(device, dtype, size, seconds)


def _time_products(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """Seconds that the fastest of several square matrix products took."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    b = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    end, num_timed = time.perf_counter() + seconds, 0
    with torch.inference_mode():
        a @ b  # the first product pays for packing and kernel selection
        while True:
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            now = time.perf_counter()
            best, num_timed = min(best, now - start), num_timed + 1
            if now >= end and num_timed >= _MIN_TIMINGS:
                return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Throughput:
    """Turns the time of some steps into the `throughput/` metrics of a run."""

    seq_len: int
    """Tokens of one example."""
    flops_per_token: int
    """Operations of one token in the forward pass; training takes three times as many."""
    peak: DevicePeak
    """The limit of one device."""
    num_devices: int = 1
    """Devices of the run."""
    _doubts: list[float] = field(default_factory=list, repr=False, compare=False)
    """The first MFU above 100 %, once it was said."""

    def metrics(
        self, *, num_examples: int, num_steps: int, seconds: float, total_examples: int
    ) -> dict[str, float]:
        """Rates over `num_steps` steps of `num_examples` examples together in `seconds`."""
        tokens_per_second = num_examples * self.seq_len / seconds
        flops_per_second = 3 * self.flops_per_token * tokens_per_second
        total_tokens = total_examples * self.seq_len
        mfu = 100 * flops_per_second / (self.peak.flops * self.num_devices)
        return {
            "throughput/duration": seconds / num_steps,
            "throughput/examples_per_second": num_examples / seconds,
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/gflops_per_second": flops_per_second / 1e9,
            "throughput/mfu": self._believed(mfu),
            "throughput/total_tokens": total_tokens,
            "throughput/total_gflops": 3 * self.flops_per_token * total_tokens / 1e9,
        }

    def least_seconds(self, num_examples: int) -> float:
        """The time that training on so many examples takes at the peak of all devices."""
        flops = 3 * self.flops_per_token * self.seq_len * num_examples
        return flops / (self.peak.flops * self.num_devices)

    def _believed(self, mfu: float) -> float:
        """NaN where more was done than the device can do: then its peak is wrong."""
        if mfu <= 100:
            return mfu
        if not self._doubts:
            self._doubts.append(mfu)
            reached = mfu / 100 * self.peak.flops
            why = "it is not that of this device"
            if self.peak.source == "measured":
                why = "the machine was busy when it was measured"
            log.warning(
                f"MFU is not shown: a device reached {reached / 1e9:.3g} GFLOP/s, above its"
                f" peak of {self.peak.flops / 1e9:.3g} GFLOP/s ({self.peak.source}); {why}"
            )
        return math.nan

    def summary(self) -> dict[str, float | str]:
        """Facts that do not change during a run."""
        return {
            "throughput/device_kind": self.peak.kind,
            "throughput/peak_source": self.peak.source,
            "throughput/theoretical_flops_per_device": self.peak.flops,
            "throughput/theoretical_flops": self.peak.flops * self.num_devices,
            "throughput/flops_per_example": 3 * self.flops_per_token * self.seq_len,
        }
