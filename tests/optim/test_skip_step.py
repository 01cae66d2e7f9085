"""The window of recent losses and gradient norms."""

import math
import statistics

import pytest
import torch

from ostro.optim import SkipStep, SkipStepConfig


def skip_step(length: int = 10, sigma: float = 6.0) -> SkipStep:
    return SkipStepConfig(length, sigma).build("cpu")


def observe(guard: SkipStep, loss: float, norm: float = 1.0) -> tuple[bool, dict[str, float]]:
    skip, metrics = guard.update(torch.tensor(loss), torch.tensor(norm))
    return bool(skip), {name: value.item() for name, value in metrics.items()}


def filled(losses: list[float], length: int = 10) -> SkipStep:
    guard = skip_step(length)
    for loss in losses:
        observe(guard, loss)
    return guard


LOSSES = [2.0, 2.2, 1.8, 2.0, 2.0]


def test_worked_example():
    skip, metrics = observe(filled(LOSSES), 2.75)
    assert not skip
    assert metrics == pytest.approx(
        {
            "optim/skipped_step": 0.0,
            "optim/skip_step/loss": 2.75,
            "optim/skip_step/loss_threshold": 2.758947,
            "optim/skip_step/loss_std": 0.126491,
            "optim/skip_step/grad_norm": 1.0,
            "optim/skip_step/grad_norm_threshold": 1.000006,
            "optim/skip_step/grad_norm_std": 1e-6,
        },
        rel=2e-6,
    )
    skip, metrics = observe(filled(LOSSES), 2.80)
    assert skip
    assert metrics["optim/skipped_step"] == 1.0


def test_either_the_loss_or_the_norm_is_enough():
    assert observe(filled(LOSSES), 2.0, norm=1.1)[0]
    assert not observe(filled(LOSSES), 2.0, norm=1.0)[0]
    assert not observe(filled(LOSSES), 0.001, norm=0.001)[0], "small values are fine"


def test_nothing_is_skipped_before_half_the_window_is_seen():
    skip, metrics = observe(filled(LOSSES[:4]), 1e9)
    assert not skip
    assert metrics["optim/skip_step/loss_threshold"] == math.inf
    tiny = filled([1.0], length=2)  # half of two is one, two are the least
    assert not observe(tiny, 1e9)[0]


def test_skipped_values_enter_the_window():
    guard = filled(LOSSES)
    assert observe(guard, 2.8)[0]
    _, metrics = observe(guard, 2.0)
    assert metrics["optim/skip_step/loss_std"] == pytest.approx(statistics.pstdev([*LOSSES, 2.8]))


def test_values_that_are_not_finite_are_skipped_and_stay_out():
    guard = filled(LOSSES)
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)):
        assert observe(guard, loss, norm)[0]
    skip, metrics = observe(guard, 2.75)
    assert not skip
    assert metrics["optim/skip_step/loss_threshold"] == pytest.approx(2.758947, rel=1e-6)


def test_the_window_rolls():
    guard = skip_step(4)
    generator = torch.Generator().manual_seed(0)
    losses = (2 + torch.rand(11, generator=generator)).tolist()
    for step, loss in enumerate(losses):
        _, metrics = observe(guard, loss)
        if step >= 2:
            past = losses[max(0, step - 4) : step]
            limit = statistics.mean(past) + 6 * statistics.pstdev(past)
            assert metrics["optim/skip_step/loss_threshold"] == pytest.approx(limit, rel=1e-5)


def test_state_goes_on_and_fits_another_length():
    losses = [2.0 + 0.01 * step for step in range(13)]
    guard = filled(losses)
    copy = skip_step()
    copy.load_state_dict({name: value.clone() for name, value in guard.state_dict().items()})
    for loss in (2.1, 2.3, 9.0, 2.2):
        assert observe(copy, loss) == observe(guard, loss)

    for length in (6, 30):
        resized = skip_step(length)
        resized.load_state_dict(filled(losses).state_dict())
        observe(resized, 2.0)
        _, metrics = observe(resized, 2.0)
        past = [*losses[-10:], 2.0][-length:]
        expected = statistics.pstdev(past)
        assert metrics["optim/skip_step/loss_std"] == pytest.approx(expected, rel=1e-4)
