"""Pickles that would keep Python busy, fill its memory, or run code: refused before they are."""

import pickle
import time
from collections import OrderedDict
from pathlib import Path

import pytest

from ostro.core.errors import DataError
from ostro.data.meta import read_alphabet
from ostro.io.pickles import scan


def doubled(value, times):
    for _ in range(times):
        value = [value, value]
    return value


def _tuples(times: int) -> bytes:
    """A tuple of itself twice, so many times, as a key."""
    inner = b"".join(b"h" + bytes([i - 1]) + b"\x86q" + bytes([i]) for i in range(1, times))
    return b"\x80\x02}K\x01K\x02\x86q\x00" + inner + b"K\x00s."


def _tower(depth: int) -> bytes:
    return b"\x80\x02)" + b"\x85" * depth + b"."


HOSTILE = {
    "a key that takes 2**40 steps to hash": _tuples(40),
    "a list of 2**45 values": pickle.dumps({"itos": {0: doubled("x", 45)}}, 2),
    "the same, in protocol 0": pickle.dumps(doubled("x", 45), 0),
    "the same, in protocol 4": pickle.dumps(doubled("x", 45), 4),
    "a long text a thousand times": pickle.dumps([[text := "x" * 10_000] * 500] * 500 + [text]),
    "lists filled after they were shared": b"]q\x00]q\x01h\x00ah\x00ah\x00K\x01a0.",
    "a list in itself": b"]q\x00h\x00a.",
    "tuples too deep to hash": _tower(100_000),
    "a memo of 32 GiB": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a number of a million bits": pickle.dumps(1 << 1_000_000),
    "keys that share a hash": pickle.dumps({i * (2**61 - 1): 0 for i in range(1000)}),
    "a tuple as a key": pickle.dumps({(1, 2): 3}),
    "a call": b"cos\nsystem\n(S'true'\ntR.",
    "a call in protocol 4": pickle.dumps(Path("x")),
    "an instance": b"(S'true'\nios\nsystem\n.",
    "a persistent id": b"Px\n.",
    "an extension": b"\x82\x01.",
    "a buffer": b"\x97.",
    "the end of nothing": b".."[:0],
    "more than there is": b"X\xff\xff\xff\x7fx.",
    "less than it takes": b"\x86.",
}  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_what_is_out_of_proportion_or_runs_code_is_refused(data):
    start = time.process_time()
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        scan(data)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_pass(protocol):
    chars = sorted(set("Plain values é\n\U0001f600"))
    shared = ["x"] * 50
    values = {
        "stoi": {char: index for index, char in enumerate(chars)},
        "itos": dict(enumerate(chars)),
        "more": [1.5, None, True, b"x", -1, 2**64, (1, (2, 3)), {"a": {}}, [shared] * 50],
        "large": {str(number): number for number in range(3000)},
        1.5: "number",
    }
    data = pickle.dumps(values, protocol)
    if protocol < 3:  # bytes are made by a call there
        values["more"].remove(b"x")
        data = pickle.dumps(values, protocol)
    scan(data)


def test_the_alphabet_of_nanogpt(tmp_path):
    chars = sorted(set("First Citizen:\nBefore we proceed any further, hear me speak."))
    meta = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {char: index for index, char in enumerate(chars)},
    }
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert read_alphabet(tmp_path) == "".join(chars)


@pytest.mark.parametrize("itos", [{0: doubled("x", 10)}, {0: "x" * 10**6}, {0: 2**900}])
def test_what_is_no_character_is_not_written_out(tmp_path, itos):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": itos}))
    with pytest.raises(DataError, match="must be one character") as caught:
        read_alphabet(tmp_path)
    assert len(str(caught.value)) < 1000


def test_what_is_called_is_named():
    with pytest.raises(pickle.UnpicklingError, match=r"collections\.OrderedDict"):
        scan(pickle.dumps(OrderedDict(a=1)))
