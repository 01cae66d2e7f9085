"""Values people write with units: durations, fractions of a run, precisions, URL ranges.

Each has a parser that raises `ValueError` with a rule a user can act on, and a formatter whose
output the parser reads back.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

_UNIT_SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(
    r"(?P<number>\d+(?:\.\d+)?)\s*"
    r"(?P<unit>(?:weeks?|days?|hours?|hrs?|minutes?|mins?|seconds?|secs?|[wdhms])(?![a-z]))\s*,?\s*",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"(?:(?P<hours>\d+):)?(?P<minutes>\d*):(?P<seconds>\d+(?:\.\d+)?)$")
_MAX_NAMES = 1_000_000


def parse_duration(text: str) -> timedelta:
    """Read `20m`, `1h30m`, `45 s`, `2 days, 4:13:02`, `:13` or a bare number of seconds."""
    rest, seconds = text.strip(), 0.0
    rule = "must be a duration such as 90s, 20m, 1h30m or 2d"
    if re.fullmatch(r"\d+(\.\d+)?", rest):
        return timedelta(seconds=float(rest))
    if not rest or rest.startswith("-"):
        raise ValueError(rule)
    while rest:
        if match := _DURATION.match(rest):
            seconds += float(match["number"]) * _UNIT_SECONDS[match["unit"][0].lower()]
            rest = rest[match.end() :]
        elif match := _CLOCK.match(rest):
            hours, minutes = int(match["hours"] or 0), int(match["minutes"] or 0)
            seconds += 3600 * hours + 60 * minutes + float(match["seconds"])
            rest = ""
        else:
            raise ValueError(rule)
    return timedelta(seconds=seconds)


def format_duration(duration: timedelta) -> str:
    """Write a duration as `parse_duration` reads it: `15m`, `1h30m`, `0s`."""
    rest = duration.total_seconds()
    parts = []
    for unit in "dhm":
        count, rest = divmod(rest, _UNIT_SECONDS[unit])
        if count:
            parts.append(f"{int(count)}{unit}")
    if rest or not parts:
        parts.append(f"{rest:.6f}".rstrip("0").rstrip(".") + "s")
    return "".join(parts)


def resolve_steps(value: int | float, num_steps: int) -> int:
    """A number of steps, or a fraction of `num_steps`, as steps.

    An `int` is steps. A `float` in [0, 1] is a fraction, truncated; a float above 1 must be
    whole. Negative values are refused.
    """
    if value < 0:
        raise ValueError("must not be negative")
    if isinstance(value, int):
        return value
    if value <= 1:
        return int(value * num_steps)
    if not value.is_integer():
        raise ValueError("a value above 1 is a number of steps and must be whole")
    return int(value)


_DTYPES = {
    "f32": "float32", "float32": "float32", "full": "float32",
    "bf16": "bfloat16", "bfloat16": "bfloat16",
    "f16": "float16", "float16": "float16", "half": "float16",
    "f64": "float64", "float64": "float64",
}  # fmt: skip
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}


@dataclass(frozen=True)
class Precision:
    """A mixed-precision policy in the grammar of jmp: `f32`, `p=f32,c=bfloat16`, ...

    A name alone sets all three. Otherwise missing params are float32, a missing compute type
    is that of the params, and a missing output type that of compute.
    """

    params: str = "float32"
    """Type of the stored (master) weights and of the optimizer's moments."""
    compute: str = "float32"
    """Type of the matrix products and of the residual stream."""
    output: str = "float32"
    """Type of what the model returns as logits. The loss is always computed in float32."""

    @classmethod
    def from_text(cls, text: str) -> "Precision":
        """Parse the policy; `ValueError` names the unknown key or type."""
        if "=" not in text:
            dtype = _parse_dtype(text.strip())
            return cls(dtype, dtype, dtype)
        found: dict[str, str] = {}
        for part in text.split(","):
            key, _, value = (piece.strip() for piece in part.partition("="))
            names = {"p": "params", "c": "compute", "o": "output"}
            name = names.get(key, key)
            if name not in names.values():
                raise ValueError(f"unknown key {key!r}: use p (params), c (compute), o (output)")
            if name in found:
                raise ValueError(f"{name} is given twice")
            found[name] = _parse_dtype(value)
        params = found.get("params", "float32")
        compute = found.get("compute", params if "params" in found else "float32")
        return cls(params, compute, found.get("output", compute))

    def __str__(self) -> str:
        if self.params == self.compute == self.output:
            return _SHORT[self.params]
        names = (_SHORT[self.params], _SHORT[self.compute], _SHORT[self.output])
        return "p={},c={},o={}".format(*names)


def _parse_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"unknown type {name!r}: use f32, bf16, f16 or f64")
    return _DTYPES[name]


def expand_braces(pattern: str) -> list[str]:
    """Expand `a.{1..128}.gz` and `{train,val}.txt`, leftmost fastest-changing last, as a shell.

    Zero padding is kept: `{001..010}`. Text without braces comes back as it is. `ValueError`
    where there would be too many names to hold.
    """
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth = 0
    for end in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[end], 0)
        if depth == 0:
            break
    else:
        return [pattern]
    head, body, tail = pattern[:start], pattern[start + 1 : end], pattern[end + 1 :]
    options = _brace_options(body)
    if options is None:  # not an expansion: keep the braces, go on behind them
        return [f"{head}{{{body}}}{rest}" for rest in expand_braces(tail)]
    rests = expand_braces(tail)
    _require_few(len(options) * len(rests))
    return [head + option + rest for option, rest in itertools.product(options, rests)]


def _require_few(count: int) -> None:
    if count > _MAX_NAMES:
        raise ValueError(f"its braces stand for more than {_MAX_NAMES:,} names")


def _brace_options(body: str) -> list[str] | None:
    if match := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?", body):
        first, last, step = match[1], match[2], int(match[3] or 1) or 1
        padded = any(
            len(n.lstrip("-")) > 1 and n.lstrip("-").startswith("0") for n in (first, last)
        )
        width = max(len(first), len(last)) if padded else 0
        low, high = int(first), int(last)
        numbers = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
        _require_few(abs(high - low) // step)
        return [f"{number:0{width}d}" for number in numbers]
    parts, depth, current = [], 0, ""
    for char in body:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    if not parts:
        return None
    return [option for part in [*parts, current] for option in expand_braces(part)]


def format_bytes(num_bytes: float) -> str:
    """`1536` as `1.5 KB`; decimal units, as disks are sold."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


class ByteSize(int):
    """A number of bytes: `200GB`, `1.5 TB`, `512MiB` or `1000000`."""

    @classmethod
    def from_text(cls, text: str) -> "ByteSize":
        """Read it; decimal units unless an `i` says binary."""
        match = _BYTES.fullmatch(text.strip())
        if not match:
            raise ValueError("must be a number of bytes such as 500MB, 200GB or 1.5TiB")
        number, unit, binary = match.groups()
        power = " kmgt".index(unit.lower() or " ")
        return cls(round(float(number) * (1024 if binary else 1000) ** power))

    def __str__(self) -> str:
        for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "KB")):
            if self and self % 1000**power == 0:
                return f"{self // 1000**power}{unit}"
        return int.__repr__(self)


def format_count(count: float) -> str:
    """`124439808` as `124.4M`, for tables and progress lines."""
    for unit in ("", "k", "M", "B", "T"):
        if abs(count) < 1000 or unit == "T":
            break
        count /= 1000
    return f"{count:.0f}" if unit == "" else f"{count:.3g}{unit}"


def in_run_folder(pattern: str, run_id: str) -> str:
    """A run's own folder: the id replaces `${run_id}`; without one it is appended.

    A pattern that ends with `/.` is the folder as it stands.
    """
    if "${run_id}" in pattern:
        return pattern.replace("${run_id}", run_id).rstrip("/")
    if pattern.endswith("/."):
        return pattern.removesuffix("/.") or "/"
    return f"{pattern.rstrip('/')}/{run_id}"


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """A table as lines; the columns of these numbers are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        padded = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in cells]
        yield "  ".join(padded).rstrip()
