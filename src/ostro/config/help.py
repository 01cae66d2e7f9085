"""What `--help` prints, and the resolved tree with its origins."""

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any

import yaml

from ostro.config import fields
from ostro.config.encode import dump_yaml
from ostro.config.loading import Loaded
from ostro.config.nodes import value_text

_WIDTH = 100


def help_text(cls: type) -> str:
    """Every setting as a flag, with its type, default and docstring.

    Of a registry the default choice is shown in full and the others by name.
    """
    doc = cls.__doc__ or ""
    if doc.startswith(f"{cls.__name__}("):  # made by @dataclass, says nothing
        doc = ""
    head = [*textwrap.wrap(doc.split("\n\n")[0], _WIDTH), ""] if doc else []
    lines = ["settings (in a YAML file, or as flags --name value):", ""]
    return "\n".join([*head, *lines, *_section(cls, "", MISSING, ())])


def _section(cls: type, path: str, default: Any, seen: tuple[type, ...]) -> list[str]:
    lines: list[str] = []
    seen = (*seen, cls)
    for item in fields.settings(cls):
        name, doc = fields.join(path, item.name), fields.field_docs(cls).get(item.name)
        value = item.default if default is MISSING else getattr(default, item.name)
        inner = type(value)
        if not fields.is_record(inner) or inner in seen:
            lines += _entry(name, item.type, value, doc)
            if value is None or value is MISSING:
                for member in fields.members(item.type):
                    if (
                        fields.is_record(member)
                        and not fields.is_registry(member)
                        and member not in seen
                    ):
                        lines += _section(member, name, MISSING, seen)
            continue
        if (registry := fields.registry_in(item.type)) is not None:
            lines += _entry(f"{name}.type", registry, fields.choice_name(inner), doc)
        elif doc:
            lines += ["", *textwrap.wrap(f"{name}: {doc}", _WIDTH)]
        lines += _section(inner, name, value, seen)
    return lines


def _entry(name: str, tp: Any, value: Any, doc: str | None) -> list[str]:
    default = "required" if value is MISSING else f"default {value_text(value)}"
    lines = [f"  --{name}  {fields.type_text(tp)}  ({default})"]
    for paragraph in (doc or "").split("\n\n"):
        lines += textwrap.wrap(paragraph, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return lines


def format_tree(loaded: Loaded) -> str:
    """The resolved configuration as YAML, each leaf followed by a comment with its origin."""
    text = dump_yaml(loaded.config)
    lines = text.rstrip("\n").split("\n")
    rows = {row: loaded.origins.get(path, "") for path, row in _leaf_rows(yaml.compose(text), "")}
    width = min(72, max((len(lines[row]) for row in rows), default=0))
    for row, origin in rows.items():
        lines[row] = f"{lines[row]:<{width}}  # {origin}"
    return "\n".join(lines)


def _leaf_rows(node: Any, path: str) -> Iterator[tuple[str, int]]:
    """The dotted path and the line of every leaf; a list of scalars is one leaf."""
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, child in node.value:
            yield from _leaf_rows(child, fields.join(path, key.value))
    elif isinstance(node, yaml.SequenceNode) and not node.flow_style:
        for index, child in enumerate(node.value):
            yield from _leaf_rows(child, fields.join(path, index))
    else:
        yield path, node.start_mark.line
