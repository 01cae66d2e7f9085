"""Text to a value of a scalar type, by the field's type and never by a guess."""

import math
import re
from datetime import timedelta
from typing import Any, Literal, get_args, get_origin

import draccus

from ostro.config.fields import is_text_class, literal_text
from ostro.config.nodes import Mapping, Node, Scalar, Sequence
from ostro.core.errors import did_you_mean
from ostro.core.units import parse_duration

_INT = re.compile(r"[+-]?\d[\d_]*")
_FLOAT = re.compile(r"[+-]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][+-]?\d+)?")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_RANK = (bool, int, float, timedelta)


class BadValue(ValueError):
    """A value does not fit the type: the rule, what to write instead, and which node."""

    def __init__(self, rule: str, advice: str = "", node: Node | None = None):
        super().__init__(rule)
        self.advice, self.node = advice, node


def read_scalar(types: list[Any], node: Scalar) -> Any:
    """The value of the most particular type that the text fits; `BadValue` if none."""
    if node.quoted and str in types:
        return node.text
    errors = []
    for tp in sorted(types, key=_rank):
        try:
            return _read(tp, node)
        except BadValue as error:
            errors.append(error)
    if float in types and int in types:  # one of them is enough to name
        errors = [error for error in errors if str(error) != "must be a whole number"]
    if len(errors) == 1:
        raise errors[0]
    rules = [str(error).removeprefix("must be ") for error in errors]
    advice = next((error.advice for error in errors if error.advice), "")
    raise BadValue("must be " + " or ".join(rules), advice)


def plain(node: Node) -> Any:
    """A node as plain Python values, for fields of no particular type (`Any`, a bare `dict`)."""
    if isinstance(node, Scalar):
        return None if node.is_null else read_scalar([bool, int, float, str], node)
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return {k: plain(child) for k, child in node.items.items()} if isinstance(node, Mapping) else {}


def _rank(tp: Any) -> int:
    if tp in _RANK:
        return _RANK.index(tp)
    return len(_RANK) + (2 if tp is str else 0 if get_origin(tp) is Literal else 1)


def _read(tp: Any, node: Scalar) -> Any:
    text = node.text.strip()
    if tp is str:
        return node.text
    if tp is bool:
        if text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
        raise BadValue("must be true or false")
    if get_origin(tp) is Literal:
        values = {literal_text(value): value for value in get_args(tp)}
        if node.text in values:
            return values[node.text]
        raise BadValue(f"must be one of {', '.join(values)}", did_you_mean(text, values))
    if tp is int:
        return _read_int(text)
    if tp is float:
        return _read_float(text)
    try:
        if tp is timedelta:
            return parse_duration(text)
        if is_text_class(tp):
            return tp.from_text(node.text)
    except OverflowError:
        raise BadValue("is too large") from None
    except ValueError as error:
        raise BadValue(str(error)) from None
    try:  # paths, enumerations, and whatever a user taught draccus
        return draccus.decode(tp, plain(node))
    except Exception as error:
        name = getattr(tp, "__name__", str(tp))
        raise BadValue(f"must be a {name}: {' '.join(str(error).split())}") from None


def _read_int(text: str) -> int:
    if _INT.fullmatch(text):
        if len(text) > 4000:
            raise BadValue("has too many digits")
        return int(text.replace("_", ""))
    try:
        value = _read_float(text)
    except BadValue:
        value = math.nan
    whole = value.is_integer() and abs(value) < 1e18
    raise BadValue("must be a whole number", f"write {int(value)}" if whole else "")


def _read_float(text: str) -> float:
    if not _FLOAT.fullmatch(text):
        if text.lower().lstrip("+-.") in ("inf", "infinity", "nan"):
            raise BadValue("must be a finite number")
        raise BadValue("must be a number")
    value = float(text.replace("_", ""))
    if math.isinf(value):
        raise BadValue("must be a finite number")
    return value
