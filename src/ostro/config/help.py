"""What `--help` prints, and the resolved tree with its origins."""

import textwrap
from dataclasses import MISSING, is_dataclass
from typing import Any

from ostro.config.encode import dump_yaml, encode
from ostro.config.fields import (
    choice_name,
    default_of,
    field_docs,
    hints,
    is_registry,
    join,
    members,
    records,
    settable,
    type_text,
)
from ostro.config.loading import Loaded
from ostro.config.nodes import value_text

_WIDTH = 100


def help_text(cls: type) -> str:
    """Every setting as a flag, with its type, default and docstring.

    Of a registry the default choice is shown in full and the others by name.
    """
    head = inspect_summary(cls)
    lines = ["settings (in a YAML file, or as flags --name value):", ""]
    return "\n".join([*head, *lines, *_section(cls, "", MISSING, ())])


def inspect_summary(cls: type) -> list[str]:
    """The first paragraph of a class's own docstring."""
    doc = cls.__doc__ or ""
    if doc.startswith(f"{cls.__name__}("):  # made by @dataclass, says nothing
        return []
    return [*textwrap.wrap(doc.split("\n\n")[0], _WIDTH), ""] if doc else []


def _section(cls: type, path: str, default: Any, seen: tuple[type, ...]) -> list[str]:
    lines: list[str] = []
    docs = field_docs(cls)
    for item in settable(cls):
        name, tp = join(path, item.name), hints(cls)[item.name]
        value = default_of(item) if default is MISSING else getattr(default, item.name)
        inner = type(value) if is_dataclass(value) and not hasattr(value, "from_text") else None
        if inner is None or inner in seen:
            lines += _entry(name, tp, value, docs.get(item.name, ""))
            if value is None or value is MISSING:
                for record in [] if any(is_registry(m) for m in members(tp)) else records(tp):
                    if record not in (*seen, cls) and record in members(tp):
                        lines += _section(record, name, MISSING, (*seen, cls))
            continue
        registry = next((member for member in members(tp) if is_registry(member)), None)
        if registry is not None:
            lines += _entry(f"{name}.type", registry, choice_name(inner), docs.get(item.name, ""))
        elif item.name in docs:
            lines += ["", *textwrap.wrap(f"{name}: {docs[item.name]}", _WIDTH)]
        lines += _section(inner, name, value, (*seen, cls))
    return lines


def _entry(name: str, tp: Any, value: Any, doc: str) -> list[str]:
    default = "required" if value is MISSING else f"default {value_text(value)}"
    lines = [f"  --{name}  {type_text(tp)}  ({default})"]
    for paragraph in doc.split("\n\n"):
        lines += textwrap.wrap(paragraph, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return lines


def format_tree(loaded: Loaded) -> str:
    """The resolved configuration as YAML, each leaf followed by a comment with its origin."""
    rows = list(_rows(encode(loaded.config), "", 0, loaded.origins))
    width = min(72, max((len(text) for text, origin in rows if origin), default=0))
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in rows)


def _rows(value: Any, path: str, depth: int, origins: dict[str, str]):
    indent = "  " * depth
    for key, child in value.items():
        place = join(path, key)
        head = dump_yaml({key: None}).rsplit(":", 1)[0] + ":"
        if isinstance(child, dict) and child:
            yield f"{indent}{head}", ""
            yield from _rows(child, place, depth + 1, origins)
        elif isinstance(child, list) and any(isinstance(item, (dict, list)) for item in child):
            yield f"{indent}{head}", ""
            for index, item in enumerate(child):
                yield from _item_rows(item, join(place, index), depth + 1, origins)
        else:
            yield f"{indent}{head} {_flow(child)}", origins.get(place, "")


def _item_rows(item: Any, place: str, depth: int, origins: dict[str, str]):
    indent = "  " * depth
    if not isinstance(item, dict) or not item:
        yield f"{indent}- {_flow(item)}", origins.get(place, "")
        return
    for index, (text, origin) in enumerate(_rows(item, place, depth + 1, origins)):
        yield (f"{indent}- {text[len(indent) + 2 :]}" if index == 0 else text), origin


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return dump_yaml(value).removesuffix("\n").removesuffix("...").rstrip("\n")
