"""Command-line flags to one layer: `--a.b value`, `--a.b=value`, and `--a.b` for true."""

import re
from collections.abc import Collection, Sequence

from ostro.config.files import Reader
from ostro.config.nodes import Mapping, Scalar, mapping_at
from ostro.errors import Problem, did_you_mean

_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


def parse_flags(flags: Sequence[str], reader: Reader, known: Collection[str]) -> Mapping:
    """All flags as one layer. Values are YAML; `known` names serve the suggestions."""
    layer = Mapping({}, "command line")
    words = list(flags)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            following = "" if equals or not words or _is_flag(words[0]) else f" {words.pop(0)}"
            hint = suggest(name, known) or f"write --{word.lstrip('-')}{following}"
            reader.problems.append(
                Problem(word, "is not a flag: settings start with --", hint, None, "command line")
            )
            continue
        given = True
        if not equals:
            given = bool(words) and not _is_flag(words[0])
            value = words.pop(0) if given else "true"
        name = name[2:]
        if not _NAME.fullmatch(name):
            problem = Problem(
                f"--{name}",
                "is not the name of a setting",
                suggest(name, known) or "names look like --trainer.seed",
                value if given else None,
                "command line",
            )
            reader.problems.append(problem)
            continue
        *path, key = name.split(".")
        place, node = mapping_at(layer, path, f"--{name}"), reader.text(value, f"--{name}")
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
