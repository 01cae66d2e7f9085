"""JSON that may be damaged or forged, held against the shape it was written in."""

import json
import re
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from ostro.core.errors import OstroError

FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
"""How a file may name others in its folder, lest it reaches out of there."""


def read_object(
    data: bytes,
    where: str,
    error: type[OstroError],
    shape: Mapping[Any, Any] | None = None,
    advice: str = "",
) -> dict[str, Any]:
    """A JSON object of this shape; the error that it is none names `where`."""
    advice = advice and f" - {advice}"
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as fault:
        raise error(f"{where} - is damaged, it is not JSON: {fault}{advice}") from fault
    if not matches_schema(value, shape or {}):
        raise error(f"{where} - is damaged: not what ostro writes there{advice}")
    return value


def matches_schema(value: Any, shape: Any) -> bool:
    """Whether a JSON value is of a type, a text that matches a pattern, a list of values of the
    shape in `[shape]`, of just those in a tuple, or an object with these keys and maybe others;
    with a pattern for a key all keys match it, and all values have its shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        if len(shape) == 1 and isinstance(pattern := next(iter(shape)), re.Pattern):
            of_keys = all(matches_schema(key, pattern) for key in value)
            return of_keys and all(matches_schema(part, shape[pattern]) for part in value.values())
        return all(key in value and matches_schema(value[key], part) for key, part in shape.items())
    if isinstance(shape, list):
        if not isinstance(value, list):
            return False
        if isinstance(shape[0], tuple) and all(type(part) is type for part in shape[0]):
            return _are_rows(value, shape[0])
        return all(matches_schema(item, shape[0]) for item in value)
    if isinstance(shape, tuple):
        is_as_long = isinstance(value, list) and len(value) == len(shape)
        return is_as_long and all(map(matches_schema, value, shape))
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    return type(value) is shape


def _are_rows(values: list[Any], types: tuple[type, ...]) -> bool:
    """Whether these are lists of values of just these types; a hundred thousand files may be."""
    if not set(map(type, values)) <= {list} or not set(map(len, values)) <= {len(types)}:
        return False
    return all(
        set(map(type, map(itemgetter(index), values))) <= {kind} for index, kind in enumerate(types)
    )
