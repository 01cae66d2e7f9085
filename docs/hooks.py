"""Pages that mkdocs makes from the source: field tables and one reference page per package.

A line `<!-- fields: ostro.checkpoint.CheckpointerConfig -->` in a page becomes a table of the
fields of that class, with the docstrings that `--help` prints. A registry's line becomes one
table for each of its types.
"""

import ast
import importlib
import re
from dataclasses import MISSING, fields
from pathlib import Path

import yaml
from mkdocs.structure.files import File, Files

from ostro.config import encode, field_docs

SOURCE = Path(__file__).parents[1] / "src" / "ostro"
_FIELDS = re.compile(r"^<!-- fields: (\S+) -->$", re.MULTILINE)


def on_files(files: Files, config) -> Files:
    """Add the reference: a page per package or module, and their index."""
    rows = []
    for name, modules in sorted(reference().items()):
        summary = ast.get_docstring(ast.parse(source_of(f"ostro.{name}").read_text())) or ""
        rows.append(f"| [`ostro.{name}`]({name}.md) | {summary.splitlines()[0]} |")
        body = "".join(f"::: {module}\n\n" for module in modules)
        text = f"# ostro.{name}\n\n{body}"
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    text = "# Reference\n\nMade from the docstrings.\n\n| part | what it is |\n|---|---|\n"
    text += "\n".join(rows) + "\n"
    files.append(File.generated(config, "reference/index.md", content=text))
    return files


def on_config(config):
    """List the reference pages in the navigation before mkdocs reads it."""
    pages = ["reference/index.md", *(f"reference/{name}.md" for name in sorted(reference()))]
    config.nav = [{"Reference": pages} if "Reference" in entry else entry for entry in config.nav]
    return config


def on_page_markdown(markdown: str, **_) -> str:
    """Replace the field lines of a page by tables."""
    return _FIELDS.sub(lambda match: tables(match[1]), markdown)


def reference() -> dict[str, list[str]]:
    """Part of the package -> its public modules with docstrings, by dotted name."""
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts[-1].startswith("_"):
            continue
        found.setdefault(parts[0], []).append(".".join(["ostro", *parts]))
    return found


def source_of(module: str) -> Path:
    path = SOURCE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tables(name: str) -> str:
    """The fields of a config class as Markdown; of a registry, those of every type in it."""
    module, _, attribute = name.rpartition(".")
    cls = getattr(importlib.import_module(module), attribute)
    known = getattr(cls, "get_known_choices", dict)()
    if not known or cls in known.values():
        return table(cls)
    default = cls.default_choice_name()
    parts = []
    for choice, kind in known.items():
        mark = " (the default)" if choice == default else ""
        parts.append(f"### `type: {choice}`{mark}\n\n{paragraph(kind.__doc__)}\n\n{table(kind)}")
    return "\n\n".join(parts)


def table(cls: type) -> str:
    """One row for each field: setting, default, meaning."""
    docs = field_docs(cls)
    rows = [
        f"| `{item.name}` | `{default_text(item)}` | {paragraph(docs.get(item.name))} |"
        for item in fields(cls)
    ]
    if not rows:
        return "No settings."
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def default_text(item) -> str:
    if item.default is MISSING and item.default_factory is MISSING:
        return "required"
    value = encode(item.default if item.default_factory is MISSING else item.default_factory())
    if isinstance(value, dict) and value:
        return f"type: {value['type']}" if "type" in value else "see there"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip().replace("|", "\\|")


def paragraph(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
