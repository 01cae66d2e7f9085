"""Which steps get a checkpoint: pure rules, no files."""

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.checkpoint import (
    CheckpointerConfig,
    CheckpointInterval,
    Policy,
    deletions,
    disk_bytes,
)
from ostro.core.errors import ConfigError
from ostro.core.units import ByteSize


def policy(*keep, seconds=None):
    interval = None if seconds is None else timedelta(seconds=seconds)
    return Policy(tuple(CheckpointInterval(*pair) for pair in keep), interval)


DOCUMENTED = policy((1000, 10_000), (5000, 40_000), (10_000,))


def test_documented_example_keeps_22_in_100_000_steps():
    expected = [*range(1000, 10_001, 1000), *range(15_000, 40_001, 5000)]
    expected += range(50_000, 100_001, 10_000)
    assert DOCUMENTED.permanent_steps(100_000) == expected
    assert len(expected) == 22


def test_documented_example_as_a_run_keeps_its_last_step_instead_of_step_100_000():
    kept = DOCUMENTED.kept_steps(100_000)
    assert kept[-3:] == [80_000, 90_000, 99_999]
    assert len(kept) == 22


def test_until_is_inclusive_and_the_next_interval_starts_after_it():
    steps = policy((2, 10), (5, 20), (10,)).permanent_steps(49)
    assert steps == [2, 4, 6, 8, 10, 15, 20, 30, 40]


def test_nothing_is_kept_past_a_closed_last_interval():
    assert policy((2, 6)).permanent_steps(20) == [2, 4, 6]
    assert not policy((2, 6)).is_permanent(8)


def test_no_intervals_keep_only_the_last_step():
    assert policy().kept_steps(7) == [6]


def test_last_step_is_not_listed_twice():
    assert policy((5,)).kept_steps(11) == [5, 10]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), max_size=4), st.booleans())
def test_list_of_steps_agrees_with_the_question_per_step(pairs, is_open):
    pairs = sorted(pairs, key=lambda pair: pair[1])
    keep = [CheckpointInterval(every, until) for every, until in pairs]
    if keep and is_open:
        keep[-1] = CheckpointInterval(keep[-1].every)
    rule = Policy(tuple(keep), None)
    assert rule.permanent_steps(80) == [s for s in range(81) if rule.is_permanent(s)]


def test_temporaries_by_steps_make_way_for_permanents():
    rule = replace(policy((6,)), save_every=2)
    assert [rule.due(step, 0) for step in range(7)] == [
        None, None, "temporary", None, "temporary", None, "permanent"
    ]  # fmt: skip
    timed = replace(rule, save_interval=timedelta(seconds=5))
    assert (timed.due(3, 4.9), timed.due(3, 5)) == (None, "temporary")
    config = CheckpointerConfig(keep=[CheckpointInterval(6)], save_interval=None, save_every=2)
    assert config.policy == rule
    assert disk_bytes(config, 12, 100) == (2, 300), "a temporary one beside the two"


def test_temporary_is_due_once_the_interval_has_passed():
    rule = policy(seconds=10)
    assert [rule.due(3, elapsed) for elapsed in (9.9, 10.0, 11.0)] == [
        None,
        "temporary",
        "temporary",
    ]


def test_permanent_wins_over_temporary():
    assert policy((3,), seconds=10).due(3, 11.0) == "permanent"


def test_step_0_is_saved_only_when_forced():
    rule = policy((1,), seconds=10)
    assert rule.due(0, 100.0) is None
    assert rule.due(0, 0.0, force=True) == "permanent"


def test_disk_counts_the_last_step_and_the_temporary_one_being_replaced():
    keep = [CheckpointInterval(5)]  # 5, 10 and the last step, 11
    assert disk_bytes(CheckpointerConfig(keep=keep, save_interval=None), 12, 100) == (3, 300)
    assert disk_bytes(CheckpointerConfig(keep=keep), 12, 100) == (3, 400)
    best = CheckpointerConfig(keep=keep, save_after_eval="improved")
    assert disk_bytes(best, 12, 100) == (3, 500)


def test_disk_of_the_file_that_each_save_replaces():
    assert disk_bytes(CheckpointerConfig(format="nanogpt"), 12, 100) == (1, 200)
    best = CheckpointerConfig(format="nanogpt", save_after_eval="improved")
    assert disk_bytes(best, 12, 100) == (1, 300)


def test_a_budget_bounds_the_disk_and_says_what_goes_when():
    keep = [CheckpointInterval(5)]  # 5, 10, 15 and the last step, 19
    config = CheckpointerConfig(keep=keep, save_interval=None, keep_bytes=ByteSize(350))
    assert list(deletions(config, 20, 100)) == [(19, [5])]
    assert disk_bytes(config, 20, 100) == (3, 350)
    with pytest.raises(ConfigError, match=r"keep_bytes.*200"):
        list(deletions(replace(config, keep_bytes=ByteSize(199)), 20, 100))
    assert list(deletions(CheckpointerConfig(keep=keep), 20, 100)) == []


def problems(**fields):
    found = CheckpointerConfig(**fields).problems()
    return {problem.setting: problem.rule for problem in found}


def test_defaults_and_the_documented_keep_have_no_problems():
    assert problems() == {}
    assert problems(keep=list(DOCUMENTED.keep)) == {}
    assert problems(keep=[], save_interval=None) == {}


@pytest.mark.parametrize(
    ("keep", "setting", "rule"),
    [
        ([(0, None)], "keep.0.every", "must be at least 1 step"),
        ([(1, None), (5, 20)], "keep.0.until", "only the last interval may be open"),
        ([(1, 20), (5, 20)], "keep.1.until", "must be greater than 20"),
        ([(1, 20), (5, 10), (7, 30)], "keep.1.until", "must be greater than 20"),
        ([(1, 0)], "keep.0.until", "must be at least 1"),
    ],
)
def test_keep_problems(keep, setting, rule):
    found = problems(keep=[CheckpointInterval(*pair) for pair in keep])
    assert list(found) == [setting]
    assert rule in found[setting]


def test_other_problems():
    assert "save_interval" in problems(save_interval=timedelta(0))
    assert "base_path" in problems(base_path=" ")
    assert "keep_bytes" in problems(keep_bytes=ByteSize(9), format="nanogpt")


@pytest.mark.parametrize(
    ("base_path", "folder"),
    [
        ("checkpoints/${run_id}", "checkpoints/ab1"),
        ("checkpoints/gpt2/", "checkpoints/gpt2/ab1"),
        ("checkpoints", "checkpoints/ab1"),
        ("s3://bucket/${run_id}/ckpt/", "s3://bucket/ab1/ckpt"),
        ("memory://x", "memory://x/ab1"),
        ("/", "/ab1"),
    ],
)
def test_run_id_is_appended_unless_the_path_names_it(base_path, folder):
    assert CheckpointerConfig(base_path=base_path).folder("ab1") == folder
