"""A short, always equal run of the fuzzer (`python tests/fuzz --help`), and what it once found."""

import pytest
import readers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import mutate

CHECKS = settings(
    derandomize=True, database=None, deadline=None, max_examples=150,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(params=readers.TARGETS)
def target(request, tmp_path, monkeypatch):
    monkeypatch.setenv("OSTRO_CACHE_HOME", str(tmp_path / "home"))
    return readers.TARGETS[request.param](tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_an_error_that_says_so(target):
    valid = [target.run(seed) for seed in target.seeds]
    assert any(valid) and not all(valid)

    @CHECKS
    @given(st.sampled_from(target.seeds), st.randoms(use_true_random=False))
    def check(seed, random):
        target.run(mutate(seed, random, target.words))

    with readers.limited_memory():
        check()
