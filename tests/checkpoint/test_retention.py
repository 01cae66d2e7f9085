"""Which checkpoints go to make room for others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.checkpoint.retention import (
    Entry,
    planned_deletions,
    to_delete,
    to_prune,
    total_bytes,
    untouchable,
)


def entry(step, size=1, **marks):
    return Entry(f"step-{step}", step, size, float(step), **marks)


@st.composite
def folders(draw):
    steps = draw(st.lists(st.integers(1, 1000), unique=True, min_size=1, max_size=12))
    return [
        Entry(
            f"step-{step}",
            step,
            draw(st.integers(1, 9)),
            draw(st.integers(0, 5)),  # a run that was rolled back: time and step disagree
            draw(st.booleans()),
            draw(st.booleans()),
        )
        for step in steps
    ]


@given(folders(), st.integers(-5, 60))
def test_just_enough_goes_and_never_the_newest_or_the_best(found, budget):
    doomed = to_delete(found, budget)
    safe = untouchable(found)
    assert max(found, key=lambda e: (e.timestamp, e.step)) in safe
    assert not set(doomed) & set(safe)
    left = total_bytes(found) - total_bytes(doomed)
    if left > budget:
        assert set(found) - set(doomed) == set(safe)
    if doomed:  # one less would not have been enough
        assert left + doomed[-1].bytes > budget


@given(folders(), st.integers(0, 60))
def test_temporary_ones_go_before_permanent_ones_oldest_first(found, budget):
    doomed = to_delete(found, budget)
    kinds = [each.is_temporary for each in doomed]
    assert kinds == sorted(kinds, reverse=True)
    times = [each.timestamp for each in doomed if each.is_temporary]
    assert times == sorted(times)
    if not all(kinds):
        safe = untouchable(found)
        assert not [e for e in found if e.is_temporary and e not in doomed and e not in safe]


def test_what_stays_lies_evenly():
    found = [entry(step) for step in range(10, 170, 10)]
    doomed = to_delete(found, 8)
    assert [e.step for e in found if e not in doomed] == [20, 40, 60, 80, 100, 120, 140, 160]


@pytest.mark.parametrize("num_steps", [5, 50, 500])
def test_a_long_run_stays_within_its_budget_and_covers_all_of_its_length(num_steps):
    steps, kept = range(100, 100 * num_steps + 1, 100), []
    plan = dict(planned_deletions(steps, 7, 60))  # eight fit
    for step in steps:
        kept = [old for old in kept if old not in plan.get(step, [])] + [step]
        assert len(kept) == min(8, step // 100)
        gaps = [b - a for a, b in zip([0, *kept], kept[:-1], strict=False)]
        assert not gaps or max(gaps) <= 0.45 * step or step < 500


def test_the_best_stays_and_an_earlier_best_does_not():
    found = [entry(1, is_best=True), entry(2, is_best=True), entry(3), entry(4)]
    assert [each.step for each in to_delete(found, 2)] == [1, 3]


def test_pruning():
    found = [entry(step) for step in range(5, 55, 5)] + [entry(52, is_temporary=True)]

    def kept(**wishes):
        doomed = to_prune(found, **wishes)
        return [each.step for each in found if each not in doomed]

    assert kept() == [e.step for e in found]
    assert kept(keep_every=20) == [20, 40, 52]
    assert kept(keep_last=3) == [45, 50, 52]
    assert kept(keep_every=20, keep_last=2) == [20, 40, 50, 52]
    assert kept(keep_every=10, keep_bytes=3) == [20, 40, 52]
    assert kept(keep_bytes=0) == [52]
