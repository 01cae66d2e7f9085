"""What a config class declares: fields, types, registries, docstrings."""

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ostro.config.choice import Choice
from ostro.core.redaction import Location

_NAMES = {str: "text", timedelta: "duration", type(None): "null"}


def join(path: str, key: str | int) -> str:
    """`a.b` and `c` as `a.b.c`."""
    return f"{path}.{key}" if path and key != "" else f"{path}{key}"


@dataclass(frozen=True)
class Setting:
    """A field that a configuration can give."""

    name: str
    type: Any
    field: Field

    @property
    def default(self) -> Any:
        """The default, or MISSING (also when its factory needs arguments)."""
        if self.field.default_factory is MISSING:
            return self.field.default
        try:
            return self.field.default_factory()
        except TypeError:  # the class of a nested section has required fields of its own
            return MISSING


@cache
def settings(cls: Any) -> tuple[Setting, ...]:
    """The settings of a dataclass, with textual annotations resolved."""
    hints = get_type_hints(cls)
    return tuple(Setting(item.name, hints[item.name], item) for item in fields(cls) if item.init)


def members(tp: Any) -> tuple[Any, ...]:
    """The alternatives of a union; one type alone is a union of one."""
    if get_origin(tp) in (Union, types.UnionType):
        return tuple(inner for member in get_args(tp) for inner in members(member))
    return (tp,)


def is_registry(tp: Any) -> bool:
    """True for a class whose `type` picks another class, False for what is registered."""
    is_choice = isinstance(tp, type) and issubclass(tp, Choice)
    return is_choice and tp not in tp.get_known_choices().values()


def is_text_class(tp: Any) -> bool:
    """True for a class that reads itself from text, such as `units.Precision`."""
    return isinstance(tp, type) and hasattr(tp, "from_text")


def is_record(tp: Any) -> bool:
    """True for what is written as a mapping with fixed keys: a dataclass or a registry."""
    return is_registry(tp) or (isinstance(tp, type) and is_dataclass(tp) and not is_text_class(tp))


def holds_location(tp: Any) -> bool:
    """True for a path or URL, or several, in an annotation that still has its extras."""
    is_location = getattr(tp, "__metadata__", None) == get_args(Location)[1:]
    return is_location or any(map(holds_location, get_args(tp)))


def is_list(tp: Any) -> bool:
    """True for `list[T]` and `tuple[...]`."""
    return (get_origin(tp) or tp) in (list, tuple)


def is_dict(tp: Any) -> bool:
    """True for `dict[K, V]`."""
    return (get_origin(tp) or tp) is dict


def element(tp: Any, index: int = 0) -> Any:
    """The type of an element of `list[T]`, `tuple[T, ...]` or `tuple[A, B]`."""
    args = get_args(tp)
    if not args:
        return Any
    if get_origin(tp) is tuple and Ellipsis not in args:
        return args[min(index, len(args) - 1)]
    return args[0]


def choice_name(cls: type) -> str | None:
    """The `type` of a registered class; None for a class that is in no registry."""
    return cls.get_choice_name(cls) if issubclass(cls, Choice) and not is_registry(cls) else None


def registry_in(tp: Any) -> Any:
    """The registry among the alternatives of a type, or None."""
    return next(filter(is_registry, members(tp)), None)


def records(tp: Any) -> Iterator[type]:
    """Every dataclass that a field of this type may hold, choices and elements included."""
    for member in members(tp):
        if is_registry(member):
            yield from member.get_known_choices().values()
        elif is_record(member):
            yield member
        elif is_list(member):
            yield from records(element(member))


def dotted_names(cls: type, path: str = "", seen: tuple[type, ...] = ()) -> Iterator[str]:
    """Every setting's dotted name, below every choice of every registry."""
    for item in settings(cls):
        name = join(path, item.name)
        yield name
        if registry_in(item.type) is not None:
            yield f"{name}.type"
        for record in records(item.type):
            if record not in (*seen, cls):
                yield from dotted_names(record, name, (*seen, cls))


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field, inherited ones included; empty without source."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for pair in pairwise(body):
            match pair:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = inspect.cleandoc(text)
    return docs


def type_text(tp: Any) -> str:
    """A field's type as a user reads it: `int | null`, `list of text`, `cosine | linear`."""
    return " | ".join(dict.fromkeys(_member_text(member) for member in members(tp)))


def _member_text(tp: Any) -> str:
    if get_origin(tp) is Literal:
        return " | ".join(map(literal_text, get_args(tp)))
    if is_list(tp):
        return f"list of {type_text(element(tp))}"
    if is_dict(tp):
        return f"mapping to {type_text(get_args(tp)[1])}" if get_args(tp) else "mapping"
    if is_registry(tp):
        return "type " + "|".join(tp.get_known_choices())
    if is_record(tp):
        return "{" + ", ".join(item.name for item in settings(tp)) + "}"
    if is_text_class(tp):
        return "text"
    return _NAMES.get(tp) or getattr(tp, "__name__", str(tp))


def literal_text(value: Any) -> str:
    """A value of a `Literal` as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
