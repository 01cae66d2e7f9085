"""Peaks that were measured, and what is not believed."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from ostro.runtime import throughput
from ostro.runtime.throughput import DevicePeak, Throughput, measure_peak
from ostro.tracker.console import figures_line, nanogpt_line


def set_clock(monkeypatch, *timings):
    """Let the products of each timing take so many seconds."""
    marks = [0.0]
    for products in timings:
        marks.append(marks[-1])
        for seconds in products:
            marks += [marks[-1], marks[-1] + seconds]
    marks = iter(marks[1:])
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(marks)))


def test_the_best_of_several_products_counts_on_a_busy_machine(monkeypatch):
    set_clock(monkeypatch, [5.0, *[0.001] * 7], [5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 0.5, 4.0])
    assert measure_peak(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.5


def test_small_products_do_for_a_type_that_the_device_has_no_instructions_for(monkeypatch):
    set_clock(monkeypatch, [0.5] * 8, [0.5] * 7 + [0.25])
    assert measure_peak(torch.device("cpu"), torch.float16) == 2 * 256**3 / 0.25


@pytest.mark.parametrize("source", ["measured", "published"])
def test_an_mfu_above_100_percent_is_not_shown_but_explained_once(source, caplog):
    speed = Throughput(100, 10**6, DevicePeak("cpu", 1e9, source))
    with caplog.at_level(logging.WARNING, "ostro"):
        found = [
            speed.metrics(num_examples=n, num_steps=1, seconds=1.0, total_examples=n)
            for n in (2, 10, 20)
        ]
    assert found[0]["throughput/mfu"] == pytest.approx(60)
    assert all(math.isnan(each["throughput/mfu"]) for each in found[1:])
    assert len(caplog.records) == 1 and "a device reached 3 GFLOP/s" in caplog.text
    assert ("busy" in caplog.text) == (source == "measured")
    assert "MFU" not in figures_line(found[1], None)
    assert "mfu -100.00%" in nanogpt_line({**found[1], "train/loss": 1.0}, 3)
