"""Mixture arithmetic and batch schedules."""

import numpy as np
import pytest

from ostro.core.errors import ConfigError
from ostro.data.order.mixture import BatchSchedule, Mixture, block_counts


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([0.6, 0.4], [1229, 819]),
        ([0.5, 0.3, 0.2], [1025, 614, 409]),
        ([6, 4], [1229, 819]),
        ([1, 0], [2048, 0]),
    ],
)
def test_counts_of_a_block(weights, counts):
    names = "abc"[: len(weights)]
    found = block_counts(dict(zip(names, weights, strict=True)), 2048)
    assert list(found.values()) == counts


def make(stages, block=16, schedule=None, seed=0, names="ab"):
    return Mixture(stages, list(names), block, seed, schedule)


def test_each_source_is_walked_through_contiguously():
    source, within = make([(0, {"a": 0.75, "b": 0.25})])(np.arange(64))
    assert within[source == 0].tolist() == list(range(48))
    assert within[source == 1].tolist() == list(range(16))
    blocks = source.reshape(4, 16)
    assert (blocks.sum(axis=1) == 4).all()
    assert len({tuple(block) for block in blocks.tolist()}) > 1


def test_any_slice_equals_the_whole():
    mixture = make([(0, {"a": 1, "b": 2})], block=10)
    whole = mixture(np.arange(100))
    for first, count in ((0, 7), (37, 30), (99, 1)):
        part = make([(0, {"a": 1, "b": 2})], block=10)(np.arange(first, first + count))
        assert all((p == w[first : first + count]).all() for p, w in zip(part, whole, strict=True))
    other = make([(0, {"a": 1, "b": 2})], block=10, seed=1)(np.arange(100))
    assert (other[0] != whole[0]).any()


def test_stages_go_on_where_the_last_one_stopped():
    schedule = BatchSchedule(((0, 8),))
    stages = [(0, {"a": 1.0}), (4, {"a": 0.5, "b": 0.5}), (8, {"b": 1.0})]
    source, within = make(stages, schedule=schedule)(np.arange(96))
    assert (source[:32] == 0).all() and (source[64:] == 1).all()
    assert source[32:64].sum() == 16
    assert within[source == 0].tolist() == list(range(48))
    assert within[source == 1].tolist() == list(range(48))


def test_a_stage_must_begin_with_a_block():
    stages = [(0, {"a": 1.0}), (1000, {"b": 1.0})]
    Mixture(stages, ["a", "b"], 2048, 0, BatchSchedule(((0, 512),)))
    with pytest.raises(ConfigError, match=r"example 64000, 31.25 blocks of .* = 2048"):
        Mixture(stages, ["a", "b"], 2048, 0, BatchSchedule(((0, 64),)))


def test_batch_schedule():
    schedule = BatchSchedule(((0, 32), (1000, 64)))
    assert (schedule.size(999), schedule.size(1000), schedule.size(1500)) == (32, 64, 64)
    assert (schedule.offset(0), schedule.offset(1000), schedule.offset(1500)) == (0, 32000, 64000)
    assert schedule.max_size == 64
    offset = 0
    for step in range(990, 1010):
        offset = schedule.offset(step) + schedule.size(step)
        assert schedule.offset(step + 1) == offset
