"""YAML files to nodes: `!include`, merge keys, the place of every value, and no Python objects.

PyYAML builds the node graph only (`yaml.compose`), so a tag can never name code to run.
"""

import os
import sys
from collections.abc import Mapping as PlainMapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yaml.resolver import Resolver

from ostro.config.nodes import BAD, Mapping, Node, Scalar, Sequence
from ostro.core.errors import Problem, did_you_mean
from ostro.core.redaction import with_secrets

MAX_DEPTH = 64
MAX_NODES = 100_000
MAX_BYTES = 4 << 20
_YAML = "tag:yaml.org,2002:"
_TAGS = {
    f"{_YAML}{name}"
    for name in ["str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value"]
}
_RESOLVER = Resolver()
_TOO_DEEP = f"nests deeper than {MAX_DEPTH} levels"


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

    def __init__(self, problems: list[Problem], texts: PlainMapping[str, str] | None = None):
        """`texts`: contents of files that lie elsewhere, in a checkpoint say, by name."""
        self.problems = problems
        self.texts = texts or {}
        self._chain: list[str] = []  # the files being read, each included by the one before
        self._flag = ""  # the flag being read
        self._num_nodes = 0
        self._is_stopped = False

    def file(self, name: str, search: Seq[Path] = ()) -> Node:
        """The mapping in a file, which is looked up here and then in `search`; or `BAD`."""
        if name in self.texts:
            return self._load(name, name, 1)
        found = self._find(name, ["", *map(str, search)], "command line")
        return BAD if found is None else self._load(found, found, 1)

    def text(self, text: str, flag: str) -> Node:
        """The value of a flag. Text that is no YAML value is taken as it is."""
        if not text.strip():
            return Scalar(text, flag, quoted=True)
        try:
            graph = yaml.compose(text, yaml.SafeLoader)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
            graph = None
        is_bare = isinstance(graph, yaml.ScalarNode) and graph.style is None
        if graph is None or (is_bare and graph.tag != "!include"):
            return Scalar(text, flag)
        self._flag = flag
        node = self._node(graph, 1)
        if isinstance(node, (Mapping, Sequence)) and graph.tag != "!include":
            node.raw = text
        return node

    def _load(self, name: str, origin: str, depth: int) -> Node:
        try:
            if name in self.texts:
                data = self.texts[name].encode()
            else:
                with _open(name) as stream:
                    data = stream.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                return self.bad(name, origin, f"is larger than {MAX_BYTES >> 20} MiB")
            text = data.decode("utf-8-sig")
            graph = yaml.compose(text, yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{name}:{mark.line + 1}" if mark else origin
            rule = ", ".join(part for part in (error.context, error.problem) if part)
            return self.bad(name, place, f"is not valid YAML: {rule}")
        except RecursionError:
            return self.bad(name, origin, _TOO_DEEP)
        except Exception as error:  # fsspec passes on whatever its backends raise
            rule = f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
            return self.bad(name, origin, rule)
        if graph is None:
            return Mapping({}, origin)
        place = f"{name}:{graph.start_mark.line + 1}"
        if depth == 1 and not isinstance(graph, yaml.MappingNode):
            if graph.tag != "!include":
                return self.bad(name, place, "must be a mapping of settings, `key: value`")
            advice = f"write `key: !include {graph.value}` or `<<: !include {graph.value}`"
            return self.bad(name, place, "a bare !include needs a key", advice)
        self._chain.append(name)
        node = self._node(graph, depth)
        self._chain.pop()
        return node

    def bad(
        self, setting: str, origin: str, rule: str, advice: str = "", value: str | None = None
    ) -> Any:
        """Record a problem; returns `BAD`."""
        self.problems.append(Problem(setting, rule, advice, value, origin))
        return BAD

    def _place(self, graph: yaml.Node) -> str:
        return f"{self._chain[-1]}:{graph.start_mark.line + 1}" if self._chain else self._flag

    def _node(self, graph: yaml.Node, depth: int) -> Node:
        """Copy the graph into our nodes; a shared anchor is copied at each use, and counted."""
        if self._is_stopped:
            return BAD
        place = self._place(graph)
        self._num_nodes += 1
        if depth > MAX_DEPTH or self._num_nodes > MAX_NODES:
            self._is_stopped = True
            rule = f"holds more than {MAX_NODES:,} values once its aliases are expanded"
            return self.bad(place, place, _TOO_DEEP if depth > MAX_DEPTH else rule)
        if graph.tag == "!include":
            return self._include(graph, place, depth)
        if graph.tag not in _TAGS:
            advice = "only !include is a tag here; quote the value if it is text"
            return self.bad(graph.tag, place, "is an unknown tag", advice)
        if isinstance(graph, yaml.MappingNode):
            return self._mapping(graph, depth)
        if isinstance(graph, yaml.SequenceNode):
            return Sequence([self._node(item, depth + 1) for item in graph.value], place)
        quoted = graph.style is not None  # type: ignore[attr-defined]
        if not quoted and graph.tag == f"{_YAML}str":  # `!!str 12` is as good as quotes
            quoted = _RESOLVER.resolve(yaml.ScalarNode, graph.value, (True, False)) != graph.tag
        return Scalar(graph.value, place, quoted)

    def _mapping(self, graph: yaml.Node, depth: int) -> Mapping:
        mapping = Mapping({}, self._place(graph))
        inherited: dict[str, Node] = {}
        for key, value in graph.value:
            place = self._place(key)
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _TAGS:
                self.bad("key", place, "must be a plain name")
            elif key.tag == f"{_YAML}merge":
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    self._merge(part, mapping, inherited, place, depth)
            elif key.value in mapping.items:
                rule = f"is written twice: first at {mapping.items[key.value].origin}"
                self.bad(key.value, place, rule, "remove one of the two")
            else:
                child = self._node(value, depth + 1)
                if child is not BAD:
                    child.origin = place
                mapping.items[key.value] = child
        mapping.items = {**inherited, **mapping.items}
        return mapping

    def _merge(
        self, graph: yaml.Node, mapping: Mapping, inherited: dict, place: str, depth: int
    ) -> None:
        """`<<: !include file` lies under the mapping; `<<: *anchor` fills in missing keys."""
        part = self._node(graph, depth + 1)
        if isinstance(part, Mapping) and graph.tag == "!include":
            mapping.base.insert(0, part)
        elif isinstance(part, Mapping):
            mapping.base = part.base + mapping.base
            for key, value in part.items.items():
                inherited.setdefault(key, value)
        elif part is not BAD:
            self.bad("<<", place, "must name a mapping")

    def _include(self, graph: yaml.Node, place: str, depth: int) -> Node:
        name = graph.value
        if not isinstance(name, str) or not name:
            return self.bad("!include", place, "must name a file: `key: !include file.yaml`")
        parent = self._chain[-1] if self._chain else ""
        folder = os.path.dirname(parent)
        if parent in self.texts or (is_url(parent) and is_url(name)):
            rule = f"is not followed from {parent}, which comes from elsewhere"
            return self.bad("!include", place, rule, "copy the file here first", name)
        found = self._find(name, [folder], place)
        if found is None:
            return BAD
        if found in self._chain:
            rule = f"includes itself: {' -> '.join([*self._chain, found])}"
            return self.bad("!include", place, rule, value=name)
        return self._load(found, place, depth + 1)

    def _find(self, name: str, folders: list[str], origin: str) -> str | None:
        """The path of a file in the first folder that has it; `.yaml` may be left out."""
        name = os.path.expanduser(name)
        looked = []
        for folder in folders:
            if is_url(name) or is_url(folder):
                return name if is_url(name) else f"{folder}/{name}"
            looked.append(os.path.normpath(os.path.join(folder, name)))
            for suffix in ("", ".yaml", ".yml"):
                path = os.path.normpath(os.path.join(folder, name + suffix))
                if os.path.exists(path) and not os.path.isdir(path):  # a pipe is as good
                    relative = os.path.relpath(path)
                    return path if relative.startswith("..") else relative
        advice = ""
        for path in looked:
            with suppress(OSError, ValueError):
                names = os.listdir(os.path.dirname(path) or ".")
                advice = advice or did_you_mean(os.path.basename(path), names)
        self.bad(name, origin, f"no such file; looked for {', '.join(looked)}", advice)
        return None


def _open(name: str) -> Any:
    if not is_url(name):
        return open(name, "rb")
    import fsspec  # slow to import, and few configurations come from a URL

    return fsspec.open(with_secrets(name), "rb")
