"""A short, always equal run of the fuzzer (`python tests/fuzz --help`), and what it once found."""

import bz2
import pickle

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


DEEP = b"[" * 3000
FOUND = [
    ("ledger", b"\x00true"),
    ("ledger", b"\x00{}"),
    ("ledger", b"\x00" + DEEP),
    ("ledger", b'\x02{"key": {}}'),
    ("ledger", b'\x03{"stored": [2]}'),
    ("ledger", b'\x03{"stored": ["../../outside"]}'),
    ("tokens", b'\x02{"key": 1}'),
    ("manifest", b'\x01{"model": {"a": {"shape": [0], "pieces": []}}}'),
    ("manifest", b'\x01{"model": {"a": {"shape": [4], "pieces": [[0, [0], [2]], [1, [9], [2]]]}}}'),
    ("pt", b"\x01"),
    ("pt", b"\x01\x80\x02X\x05\x00"),
    ("pt", b"\x01" + pickle.dumps({"format": "ostro", "model": {}, "values": 1, "texts": {}}, 2)),
    ("documents", b"\x06" + bz2.compress(bytes(1 << 27))),
    ("yaml", b"\x00model: !include /dev/zero"),
    ("yaml", b"\x03--a" + b".a" * 2000),
]


@pytest.mark.parametrize(("target", "case"), FOUND, indirect=["target"])
def test_what_once_crashed_or_filled_the_memory_is_refused(target, case):
    with readers.limited_memory():
        assert not target.run(case)


@pytest.mark.parametrize("target", ["ledger"], indirect=True)
@pytest.mark.parametrize("note", [b"null", DEEP, b"{}", b'{"key": ""}'])
def test_a_note_that_is_none_counts_for_nothing(target, note):
    assert target.run(b"\x01" + note + b"\n")
