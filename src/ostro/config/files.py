"""YAML files to nodes: `!include`, merge keys, the place of every value, and no Python objects.

PyYAML builds the node graph only (`yaml.compose`), so a tag can never name code to run.
"""

import os
import sys
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import yaml
from yaml.resolver import Resolver

from ostro.config.nodes import BAD, Mapping, Node, Scalar, Sequence
from ostro.errors import Problem, did_you_mean

MAX_DEPTH = 64
MAX_NODES = 100_000
_YAML = "tag:yaml.org,2002:"
_TAGS = {
    f"{_YAML}{name}"
    for name in ["str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value"]
}
_RESOLVER = Resolver()


class _Stop(Exception):
    """The tree is too deep or too large to go on."""


def is_url(name: str) -> bool:
    """True for `s3://...`, `https://...`: anything fsspec has to open."""
    return "://" in name


def script_folders() -> list[Path]:
    """Where a configuration may also lie: the running script's folder and its repository."""
    script = Path(sys.argv[0] or ".").resolve()
    markers = (".git", "pyproject.toml")
    roots = (p for p in script.parents if any((p / marker).exists() for marker in markers))
    return [script.parent, *[root for root in list(roots)[:1] if root != script.parent]]


class Reader:
    """Reads files and flag values into nodes, collecting `problems` instead of raising."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        self._num_nodes = 0

    def file(self, name: str, search: Seq[Path] = ()) -> Node:
        """The mapping in a file, which is looked up here and then in `search`; or `BAD`."""
        found = _find(name, ["", *map(str, search)])
        if found is None:
            self.problems.append(_missing(name, ["", *map(str, search)], "command line"))
            return BAD
        return self._load(found, [found])

    def text(self, text: str, origin: str) -> Node:
        """The value of a flag. Text that is no YAML value is taken as it is."""
        if not text.strip():
            return Scalar(text, origin, quoted=True)
        try:
            graph = yaml.compose(text, yaml.SafeLoader)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
            graph = None
        bare = isinstance(graph, yaml.ScalarNode) and graph.style is None
        if graph is None or (bare and graph.tag != "!include"):
            return Scalar(text, origin)
        node = self._guarded(graph, "", origin, [])
        if isinstance(node, (Mapping, Sequence)) and graph.tag != "!include":
            node.raw = text
        return node

    def _load(self, name: str, chain: list[str], origin: str = "", top: bool = True) -> Node:
        try:
            with _open(name) as stream:
                text = stream.read().decode("utf-8-sig")
            graph = yaml.compose(text, yaml.SafeLoader)
        except UnicodeDecodeError as error:
            return self._bad(name, "", origin or name, f"is not UTF-8 text: {error.reason}")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{name}:{mark.line + 1}" if mark else name
            rule = ", ".join(part for part in (error.context, error.problem) if part)
            return self._bad(name, "", place, f"is not valid YAML: {rule}")
        except RecursionError:
            return self._bad(name, "", name, f"nests deeper than {MAX_DEPTH} levels")
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            rule = " ".join(str(error).split())
            return self._bad(name, "", name, f"is not valid YAML: {rule}")
        except Exception as error:  # fsspec passes on whatever its backends raise
            rule = f"cannot be read: {type(error).__name__}: {error}"
            return self._bad(name, "", origin or name, rule)
        if graph is None:
            return Mapping({}, origin or name)
        if top and graph.tag == "!include":
            place = f"{name}:{graph.start_mark.line + 1}"
            advice = f"write `key: !include {graph.value}` or `<<: !include {graph.value}`"
            return self._bad(name, "", place, "a bare !include needs a key", advice)
        if top and not isinstance(graph, yaml.MappingNode):
            place = f"{name}:{graph.start_mark.line + 1}"
            return self._bad(name, "", place, "must be a mapping of settings, `key: value`")
        return self._guarded(graph, name, origin, chain)

    def _guarded(self, graph: yaml.Node, name: str, origin: str, chain: list[str]) -> Node:
        try:
            return self._node(graph, name, origin, chain, 1 + len(chain))
        except _Stop as stop:
            if len(chain) > 1:
                raise
            return self._bad(name or origin, "", origin or name, str(stop))

    def _bad(self, setting: str, value: str, origin: str, rule: str, advice: str = "") -> Node:
        self.problems.append(Problem(setting, rule, advice, value or None, origin))
        return BAD

    def _node(self, graph, name: str, origin: str, chain: list[str], depth: int) -> Node:
        """Copy the graph into our nodes; a shared anchor is copied at each use, and counted."""
        self._num_nodes += 1
        if depth > MAX_DEPTH:
            raise _Stop(f"nests deeper than {MAX_DEPTH} levels")
        if self._num_nodes > MAX_NODES:
            raise _Stop(f"holds more than {MAX_NODES:,} values once its aliases are expanded")
        place = _place(graph, name, origin)
        if graph.tag == "!include":
            return self._include(graph, place, name, chain)
        if graph.tag not in _TAGS:
            advice = "only !include is a tag here; quote the value if it is text"
            return self._bad(graph.tag, "", place, "is an unknown tag", advice)
        if isinstance(graph, yaml.MappingNode):
            return self._mapping(graph, name, origin, chain, depth)
        if isinstance(graph, yaml.SequenceNode):
            items = [self._node(item, name, origin, chain, depth + 1) for item in graph.value]
            return Sequence(items, place)
        quoted = graph.style is not None
        if not quoted and graph.tag == f"{_YAML}str":  # `!!str 12` is as good as quotes
            quoted = _RESOLVER.resolve(yaml.ScalarNode, graph.value, (True, False)) != graph.tag
        return Scalar(graph.value, place, quoted)

    def _mapping(self, graph, name: str, origin: str, chain: list[str], depth: int) -> Mapping:
        mapping = Mapping({}, _place(graph, name, origin))
        inherited: dict[str, Node] = {}
        for key, value in graph.value:
            place = _place(key, name, origin)
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _TAGS:
                self._bad("key", "", place, "must be a plain name")
                continue
            child = self._node(value, name, origin, chain, depth + 1)
            if key.tag == f"{_YAML}merge":
                self._merge(value, child, mapping, inherited, place)
                continue
            if key.value in mapping.items:
                first = mapping.items[key.value].origin
                rule = f"is written twice: first at {first}"
                self._bad(key.value, "", place, rule, "remove one of the two")
                continue
            if child is not BAD:
                child.origin = place
            mapping.items[key.value] = child
        mapping.items = {**inherited, **mapping.items}
        return mapping

    def _merge(self, graph, child: Node, mapping: Mapping, inherited: dict, place: str) -> None:
        """`<<: !include file` lies under the mapping; `<<: *anchor` fills in missing keys."""
        several = isinstance(child, Sequence)
        children = child.items if isinstance(child, Sequence) else [child]
        for part, source in zip(children, graph.value if several else [graph], strict=False):
            if part is BAD:
                continue
            if not isinstance(part, Mapping):
                self._bad("<<", "", place, "must name a mapping")
            elif source.tag == "!include":
                mapping.base.insert(0, part)
            else:
                mapping.base = part.base + mapping.base
                for key, value in part.items.items():
                    inherited.setdefault(key, value)

    def _include(self, graph, place: str, name: str, chain: list[str]) -> Node:
        if not isinstance(graph, yaml.ScalarNode) or not graph.value:
            return self._bad("!include", "", place, "must name a file: `key: !include file.yaml`")
        if is_url(graph.value):
            found = graph.value
        else:
            folder = name.rpartition("/")[0] if is_url(name) else os.path.dirname(name)
            found = _find(graph.value, [folder])
            if found is None:
                self.problems.append(_missing(graph.value, [folder], place))
                return BAD
        if any(_same(found, seen) for seen in chain):
            loop = " -> ".join([*chain, found])
            return self._bad("!include", graph.value, place, f"includes itself: {loop}")
        return self._load(found, [*chain, found], place, top=False)


def _open(name: str) -> Any:
    if not is_url(name):
        return open(name, "rb")
    import fsspec  # slow to import, and few configurations come from a URL

    return fsspec.open(name, "rb")


def _place(graph, name: str, origin: str) -> str:
    return f"{name}:{graph.start_mark.line + 1}" if name else origin


def _same(left: str, right: str) -> bool:
    return left == right or os.path.realpath(left) == os.path.realpath(right)


def _find(name: str, folders: list[str]) -> str | None:
    """The path of a file in the first folder that has it; `.yaml` and `.yml` may be left out."""
    name = os.path.expanduser(name)
    for folder in folders:
        if is_url(name):
            return name
        if is_url(folder):
            return f"{folder}/{name}"
        for suffix in ("", ".yaml", ".yml"):
            path = os.path.normpath(os.path.join(folder, name + suffix))
            if _is_file(path):
                return _short(path)
    return None


def _is_file(path: str) -> bool:
    try:  # a device such as /dev/stdin or a pipe is as good as a file
        return os.path.exists(path) and not os.path.isdir(path)
    except ValueError:  # a null byte in the name
        return False


def _short(path: str) -> str:
    """Relative to the working directory when it lies below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _missing(name: str, folders: list[str], origin: str) -> Problem:
    looked = [os.path.normpath(os.path.join(folder, name)) for folder in folders]
    advice = ""
    for path in looked:
        try:
            names = os.listdir(os.path.dirname(path) or ".")
        except (OSError, ValueError):
            continue
        advice = advice or did_you_mean(os.path.basename(path), names)
    return Problem(name, f"no such file; looked for {', '.join(looked)}", advice, None, origin)
