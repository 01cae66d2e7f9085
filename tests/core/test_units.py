"""Durations, steps or fractions, precisions, brace patterns, sizes."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.core.units import (
    ByteSize,
    Precision,
    expand_braces,
    format_bytes,
    format_count,
    format_duration,
    parse_duration,
    resolve_steps,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20m", 1200),
        ("1h30m", 5400),
        ("45 s", 45),
        ("90", 90),
        ("0.5", 0.5),
        ("1.5h", 5400),
        ("2d", 172_800),
        ("1w", 604_800),
        ("2 days, 4:13:02", 2 * 86_400 + 4 * 3600 + 13 * 60 + 2),
        ("15 minutes", 900),
        ("1 hour 1 min", 3660),
        ("1:30", 90),
        (":13", 13),
        ("0s", 0),
        (" 20M ", 1200),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "-5m", "5 parsecs", "m", "5m oops", "1:2:3:4", "20mm"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="must be a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (900, "15m"), (5400, "1h30m"), (90_061.5, "1d1h1m1.5s"), (0.25, "0.25s")],
)
def test_written_durations(seconds, text):
    assert format_duration(timedelta(seconds=seconds)) == text


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=400)))
def test_durations_survive_writing(duration):
    assert abs(parse_duration(format_duration(duration)) - duration) <= timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("value", "num_steps", "steps"),
    [
        (1, 1000, 1),
        (1.0, 1000, 1000),
        (0, 1000, 0),
        (0.01, 1000, 10),
        (0.29, 100, 28),  # truncated: 0.29 * 100 is 28.999... in floating point
        (0.999, 10, 9),
        (2000, 1000, 2000),
        (300.0, 1000, 300),
    ],
)
def test_an_integer_is_steps_and_a_fraction_is_of_the_run(value, num_steps, steps):
    assert resolve_steps(value, num_steps) == steps


@pytest.mark.parametrize(
    ("value", "rule"), [(-1, "negative"), (-0.1, "negative"), (1.5, "must be whole")]
)
def test_no_steps(value, rule):
    with pytest.raises(ValueError, match=rule):
        resolve_steps(value, 100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32", ("float32", "float32", "float32")),
        ("bfloat16", ("bfloat16", "bfloat16", "bfloat16")),
        ("p=f32,c=bfloat16", ("float32", "bfloat16", "bfloat16")),
        ("params=float32, compute=bf16, output=f32", ("float32", "bfloat16", "float32")),
        ("c=half", ("float32", "float16", "float16")),
        ("p=bf16", ("bfloat16", "bfloat16", "bfloat16")),
        ("o=f64", ("float32", "float32", "float64")),
        ("full", ("float32", "float32", "float32")),
    ],
)
def test_precisions_cascade(text, expected):
    precision = Precision.from_text(text)
    assert (precision.params, precision.compute, precision.output) == expected
    assert Precision.from_text(str(precision)) == precision


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("x=f32", "unknown key 'x'"),
        ("f33", "unknown type 'f33'"),
        ("p=f32,c=", "unknown type ''"),
        ("p=f32,params=bf16", "given twice"),
        ("", "unknown type"),
    ],
)
def test_no_precisions(text, rule):
    with pytest.raises(ValueError, match=rule):
        Precision.from_text(text)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("plain.txt", ["plain.txt"]),
        ("a.{1..3}.gz", ["a.1.gz", "a.2.gz", "a.3.gz"]),
        ("{008..010}", ["008", "009", "010"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{1..7..3}", ["1", "4", "7"]),
        ("{train,val}.txt", ["train.txt", "val.txt"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("x{a,{b,c}d}", ["xa", "xbd", "xcd"]),
        ("{alone}.txt", ["{alone}.txt"]),
        ("{alone}{1..2}", ["{alone}1", "{alone}2"]),
        ("open{1..2", ["open{1..2"]),
        ("", [""]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, expected):
    assert expand_braces(pattern) == expected


def test_128_shards():
    shards = expand_braces("s3://bucket/train.{1..128}-of-128.jsonl.gz")
    assert len(shards) == 128
    assert shards[-1] == "s3://bucket/train.128-of-128.jsonl.gz"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 KB"), (1.5e9, "1.5 GB"), (2.5e15, "2500.0 TB")],
)
def test_bytes(value, text):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200GB", 200 * 10**9),
        ("1.5 tb", 15 * 10**11),
        ("512MiB", 2**29),
        ("4k", 4000),
        ("0.1GB", 10**8),
        ("1234567", 1234567),
    ],
)
def test_sizes(text, size):
    assert ByteSize.from_text(text) == size


@given(st.integers(0, 10**15))
def test_a_size_is_read_as_it_is_written(size):
    assert ByteSize.from_text(str(ByteSize(size))) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "10 parsecs", "1e9", "1.5.1MB", "5 G i B"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="500MB"):
        ByteSize.from_text(text)


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12"), (1234, "1.23k"), (124_439_808, "124M"), (6.7e9, "6.7B")]
)
def test_counts(value, text):
    assert format_count(value) == text
