"""Keyed permutations and era shuffle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.data.order.permutation import Permutation, derive_key, shuffled


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(n, key):
    values = Permutation(n, key)(np.arange(n))
    assert sorted(values.tolist()) == list(range(n))


def test_permutation_random_access_equals_the_whole():
    whole = Permutation(1000, 7)(np.arange(1000))
    some = Permutation(1000, 7)(np.array([[3, 999], [0, 500]]))
    assert some.tolist() == [[whole[3], whole[999]], [whole[0], whole[500]]]


def test_permutation_depends_on_the_key():
    first, second = (Permutation(1000, key)(np.arange(1000)) for key in (1, 2))
    assert (first == second).mean() < 0.02
    assert (first == np.arange(1000)).mean() < 0.02


def test_permutation_of_a_huge_range():
    values = Permutation(10**12, 3)(np.arange(10_000))
    assert len(set(values.tolist())) == 10_000
    assert values.max() < 10**12 and values.mean() == pytest.approx(5e11, rel=0.05)


def test_neighbours_are_spread():
    values = Permutation(4096, 11)(np.arange(4096))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.08


@pytest.mark.parametrize("bad", [-1, 10])
def test_an_index_outside_is_our_mistake(bad):
    with pytest.raises(AssertionError, match="out of range"):
        Permutation(10, 0)(np.array([bad]))


def test_keys_tell_numbers_from_text():
    assert derive_key(1, "2") != derive_key("1", 2)
    assert derive_key("a", "b") != derive_key("ab")
    assert derive_key(0, "train") == derive_key(0, "train")


def test_every_pass_has_all_items_in_another_order():
    order = shuffled(np.arange(3 * 50), 50, True, 5).reshape(3, 50)
    assert all(sorted(row) == list(range(50)) for row in order.tolist())
    assert order[0].tolist() != order[1].tolist() != order[2].tolist()


def test_era_shuffle_stays_in_its_era():
    order = shuffled(np.arange(16), 16, 5, 0)
    eras = [order[i : i + 5].tolist() for i in (0, 5, 10, 15)]
    assert [sorted(era) for era in eras] == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15]
    ]  # fmt: skip
    assert order.tolist() != list(range(16))
    second = shuffled(np.arange(16, 32), 16, 5, 0)
    assert sorted(second[:5].tolist()) == [0, 1, 2, 3, 4]
    assert second.tolist() != order.tolist()


def test_era_of_one_and_no_shuffle_keep_the_order():
    for shuffle in (1, 0, False):
        assert shuffled(np.arange(20), 8, shuffle, 0).tolist() == [i % 8 for i in range(20)]


def test_an_era_longer_than_the_data_is_a_whole_shuffle():
    whole, era = (shuffled(np.arange(9), 9, shuffle, 4).tolist() for shuffle in (True, 100))
    assert whole == era
