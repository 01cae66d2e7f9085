"""Windows, examples, evaluation batches and the loader."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ostro.core.errors import ConfigError, DataError
from ostro.data.cache.mapped import LARGE
from ostro.data.cache.store import TokenStore
from ostro.data.loader import Loader
from ostro.data.order.mixture import BatchSchedule
from ostro.data.order.permutation import derive_key, shuffled
from ostro.data.order.sequences import IGNORE, EvalData, TrainData, cut


def store(count, files=1, start=0):
    parts = np.array_split(np.arange(start, start + count, dtype=np.uint16), files)
    return TokenStore(parts)


def train(count=101, seq_len=10, **options):
    return TrainData({"data": cut(store(count), seq_len, "x")}, 0, **options)


def test_reading_across_files():
    whole = store(100, files=7)
    for start, stop in ((0, 100), (13, 59), (14, 15), (99, 100), (5, 5)):
        assert whole.read(start, stop).tolist() == list(range(start, stop))


def test_windows_and_targets():
    batch = train(shuffle=False).get(0, 10)
    assert batch.tokens.tolist() == [list(range(i, i + 10)) for i in range(0, 100, 10)]
    assert batch.targets.tolist() == [list(range(i + 1, i + 11)) for i in range(0, 100, 10)]
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


def test_the_very_last_token_has_no_target():
    last = train(count=100, shuffle=False).get(9, 1)
    assert last.targets[0].tolist() == [*range(91, 100), IGNORE]


def test_every_pass_shows_each_window_once():
    data = train()
    first, second = (data.get(i, 10).tokens[:, 0].tolist() for i in (0, 10))
    assert sorted(first) == sorted(second) == list(range(0, 100, 10))
    assert first != second


def test_seeds_differ():
    windows = cut(store(1001), 10, "x")
    one, two = (TrainData({"data": windows}, seed).get(0, 20).tokens for seed in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("options", [{}, {"shuffle": 3}, {"sampling": "windows"}])
def test_any_slice_of_the_examples_equals_the_whole(options):
    data = train(**options)
    whole = data.get(0, 40).tokens
    pieces = [train(**options).get(i, 5).tokens for i in range(0, 40, 5)]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("shuffle", [True, 700])
def test_places_do_not_depend_on_what_was_asked_before(shuffle):
    data = train(50_000, shuffle=shuffle)
    key = derive_key(data.seed, "data")
    firsts = np.random.default_rng(0).integers(0, 20_000, 40)
    for first in [1020, 0, *firsts.tolist()]:
        indices = np.arange(first, first + 9)
        expected = shuffled(indices, data.num_windows, shuffle, key) * data.seq_len
        assert data.offsets(first, 9)[1].tolist() == expected.tolist()
    assert len(data._blocks) <= 2, "the memory of long runs stays flat"


def test_a_large_file_is_mapped_for_random_reads(tmp_path):
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.truncate(LARGE + 2)
    large = TokenStore.open([path], "uint16")
    large.expect_random()
    flags, is_ours = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        is_ours = str(path) in line or (is_ours and ":" in line.split()[0])
        flags = line if is_ours and line.startswith("VmFlags") else flags
    assert "rr" in flags.split()
    assert large.read(5, 9).tolist() == [0, 0, 0, 0]


def test_random_windows_start_anywhere_and_always_have_targets():
    batch = train(sampling="windows").get(0, 2000)
    starts = batch.tokens[:, 0]
    assert set(starts.tolist()) == set(range(91))  # the last start leaves one token for a target
    assert torch.equal(batch.targets, batch.tokens + 1)


def test_segments_are_cut_after_the_end_of_document():
    tokens = TokenStore([np.array([1, 0, 2, 3, 0, 0, 4, 5, 6], dtype=np.uint16)])
    data = TrainData({"data": cut(tokens, 8, "x", segment_id=0)}, 0)
    assert data.get(0, 1).segments.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3]]
    assert train().get(0, 1).segments is None


def test_too_little_text():
    with pytest.raises(DataError, match=r"x - the corpus has 9 tokens.* seq_len = 10"):
        cut(store(9), 10, "x")


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_together_see_the_same_batch(num_ranks):
    schedule = BatchSchedule(((0, 4), (2, 8)))
    data = train()
    for step in range(5):
        loaders = [Loader(data, schedule, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
        rows = torch.cat([loader.batch(step).tokens for loader in loaders])
        assert torch.equal(rows, data.get(schedule.offset(step), schedule.size(step)).tokens)


def test_prefetching_gives_the_same_batches_from_any_step():
    loader = Loader(train(), BatchSchedule(((0, 4),)))
    for start, batch in zip(range(3, 9), loader.batches(range(3, 9)), strict=True):
        assert torch.equal(batch.tokens, loader.batch(start).tokens)
    assert torch.equal(next(loader.batches(range(7, 8))).tokens, loader.batch(7).tokens)


def test_the_thread_ends_with_the_iterator():
    batches = Loader(train(), BatchSchedule(((0, 4),))).batches(range(1000))
    list(itertools.islice(batches, 2))
    batches.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_errors_of_the_thread_reach_the_trainer(monkeypatch):
    loader = Loader(train(), BatchSchedule(((0, 4),)))
    good = loader.batch(0)
    monkeypatch.setattr(loader, "batch", lambda step: good if step == 0 else 1 / 0)
    batches = loader.batches(range(3))
    assert next(batches) is good
    with pytest.raises(ZeroDivisionError):
        next(batches)


def mixed(stages=((0, {"a": 3, "b": 1}),), **options):
    sources = {"a": cut(store(101), 10, "a"), "b": cut(store(51, start=1000), 10, "b")}
    return TrainData(sources, 0, stages=stages, block_size=8, **options)


def test_a_mixture_draws_by_weight_and_wraps_small_sources():
    starts = mixed().get(0, 160).tokens[:, 0]
    from_b = starts[starts >= 1000]
    assert len(from_b) == 40  # eight passes over its five windows
    assert sorted(from_b[:5].tolist()) == [1000, 1010, 1020, 1030, 1040]
    assert from_b.bincount()[1000::10].tolist() == [8] * 5


def test_a_source_enters_with_its_stage():
    stages = ((0, {"a": 1.0}), (2, {"b": 1.0}))
    schedule = BatchSchedule(((0, 8),))
    loader = Loader(mixed(stages), schedule)
    assert [int(loader.batch(step).tokens.max()) >= 1000 for step in range(4)] == [
        False, False, True, True
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="must begin with a block"):
        Loader(mixed(stages), BatchSchedule(((0, 7),)))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_evaluation_shows_each_window_once_and_ranks_keep_step(num_ranks):
    data = EvalData("x", (), cut(store(101), 10, "x"))
    per_rank = [list(data.batches(4, rank=r, num_ranks=num_ranks)) for r in range(num_ranks)]
    assert {len(batches) for batches in per_rank} == {3}
    for batches in zip(*per_rank, strict=True):
        assert len({len(batch.tokens) for batch in batches}) == 1
    rows = torch.cat([batch.targets for batches in per_rank for batch in batches])
    seen = rows[rows != IGNORE]
    assert sorted(seen.tolist()) == list(range(1, 101))


def test_evaluation_stops_after_max_batches():
    data = EvalData("x", (), cut(store(101), 10, "x"))
    assert [len(batch.tokens) for batch in data.batches(4)] == [4, 4, 2]
    assert len(list(data.batches(4, max_batches=2))) == 2
