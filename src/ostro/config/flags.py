"""Command-line flags to one layer: `--a.b value`, `--a.b=value`, and `--a.b` for true."""

import re
from collections.abc import Collection, Sequence

from ostro.config.files import MAX_DEPTH, Reader
from ostro.config.nodes import Mapping, Scalar, mapping_at
from ostro.core.errors import did_you_mean

_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


def parse_flags(flags: Sequence[str], reader: Reader, known: Collection[str]) -> Mapping:
    """All flags as one layer. Values are YAML; `known` names serve the suggestions."""
    layer = Mapping({}, "command line")
    words = list(flags)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        value = text if equals else None
        if not equals and words and not _is_flag(words[0]):
            value = words.pop(0)
        if not name.startswith("--"):
            following = f" {value}" if value and not equals else ""
            advice = suggest(name, known) or f"write --{word.lstrip('-')}{following}"
            reader.bad(word, "command line", "is not a flag: settings start with --", advice)
            continue
        if not _NAME.fullmatch(name[2:]) or name.count(".") > MAX_DEPTH:
            advice = suggest(name[2:], known) or "names look like --trainer.seed"
            reader.bad(name, "command line", "is not the name of a setting", advice, value)
            continue
        *path, key = name[2:].split(".")
        place = mapping_at(layer, path, name)
        node = reader.text("true" if value is None else value, name)
        child = place.items.get(key)
        if isinstance(child, Mapping) and isinstance(node, (Mapping, Scalar)):
            child.base.append(node)  # `--model.num_layers 2 --model gpt2`: both count
        else:
            place.items[key] = node
    return layer


def suggest(name: str, known: Collection[str]) -> str:
    """The known name this may stand for, reading odd separators as dots or underscores."""
    bare = name.strip("-")
    for candidate in (re.sub(r"\W+", ".", bare), bare.replace("-", "_")):
        if candidate in known and candidate != name:
            return f"did you mean --{candidate}?"
    if candidate := did_you_mean(bare, known):
        return candidate.replace("did you mean ", "did you mean --")
    return ""


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2
