"""Layers of nodes and a dataclass, walked together: merging, conversion, and every mistake.

Each type merges in its own way, so merging happens here: mappings merge field by field, the
last list or scalar wins, and a layer that changes a `type` starts that choice afresh. Where a
field's default is an instance, a partial mapping starts from that instance's values.

Values are built here and not by `draccus.decode`, which tries the members of a union in turn
(`str | list[str]` turns a list into text), takes `int | float` and `float | int` for the same
cached type, and starts a partial mapping from the class's own defaults. Types that this module
does not know (paths, enumerations, a user's own) still go to draccus.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, is_dataclass, replace
from importlib.metadata import entry_points
from typing import Any, get_args, get_origin

from ostro.config import fields, nodes
from ostro.config.foreign import ForeignSettings
from ostro.config.merge import Stack, fold, settle
from ostro.config.scalars import BadValue, plain, read_scalar
from ostro.core.errors import Problem, did_you_mean

_NONE = type(None)
_loaded_plugins = False


@dataclass
class Converter:
    """Converts one configuration, collecting problems, notices and origins by dotted path."""

    problems: list[Problem]
    notices: list[str]
    known: list[str] = field(default_factory=list)
    """All dotted names, other spellings included, for suggestions."""
    is_partial: bool = False
    """True when a file is missing: what it may hold is then not asked for."""
    checks_defaults: bool = True
    """False where sections were left out: a default in their place may lack what is required."""
    hint: str = ""
    """What to do about a type that is not known, where that may be a module not imported."""
    foreign: ForeignSettings = field(default_factory=ForeignSettings)
    """Settings of other programs that may stand there."""
    decided: dict[str, nodes.Node] = field(default_factory=dict)
    """Dotted path to the node that decided."""

    def convert(self, tp: Any, stack: Stack, path: str) -> Any:
        """The value of type `tp`, or BAD."""
        top = stack[-1]
        if isinstance(top, nodes.Default):
            for problem in find_problems(top.value) if self.checks_defaults else ():
                self.problems.append(self._completed(problem, top.value, path))
            return top.value
        layers = [layer for node in stack for layer in nodes.explode(node)]
        if nodes.BAD in layers:
            return nodes.BAD
        types = fields.members(tp)
        top = layers[-1]
        self.decided[path] = top
        if types in ((Any,), (object,)):
            self.decided |= dict(nodes.leaves(top, path))
            return plain(top)
        if isinstance(top, nodes.Scalar) and top.is_null:
            if _NONE in types:
                return None
            if top.text or not any(map(fields.is_record, types)):
                advice = "write [] for none" if any(map(fields.is_list, types)) else ""
                return self._fail(path, "must not be null", advice)
            layers[-1] = nodes.Mapping({}, top.origin)  # `trainer:` with nothing below it
        nulls = [
            i for i, node in enumerate(layers) if isinstance(node, nodes.Scalar) and node.is_null
        ]
        if nulls:
            layers = layers[nulls[-1] + 1 :]
        try:
            return self._choose(types, layers, path)
        except BadValue as error:
            self.decided[path] = error.node or top
            return self._fail(path, str(error), error.advice)

    def origin_of(self, path: str) -> str:
        """Where a setting comes from."""
        return self.decided[path].origin if path in self.decided else "default"

    def _fail(self, path: str, rule: str, advice: str = "") -> Any:
        node = self.decided.get(path)
        text, origin = (None, None) if node is None else (nodes.written(node), node.origin)
        self.problems.append(Problem(path, rule, advice, text, origin))
        return nodes.BAD

    def _choose(self, types: tuple, layers: Stack, path: str) -> Any:
        """Pick the member of a union by the kind of node, then convert."""
        list_type = next(filter(fields.is_list, types), None)
        record = next(filter(fields.is_record, types), None)
        dict_type = next(filter(fields.is_dict, types), None)
        scalars = [tp for tp in types if tp not in (list_type, record, dict_type, _NONE)]
        shorthand = fields.is_registry(record)
        if getattr(record, "positional", False):
            layers = [_by_position(record, layer) for layer in layers]
        if list_type is not None:
            items, layers = fold(list_type, layers, path)
            if items is not None:
                return self._list(list_type, items, path)
        elif not scalars and not shorthand:
            for layer in layers:  # a scalar hidden below a mapping is a mistake too
                if not isinstance(layer, nodes.Mapping):
                    raise BadValue(f"must be {_kind(record or dict_type)}", node=layer)
        top = layers[-1]
        raw = getattr(top, "raw", None)
        if raw is not None and str in scalars and not record and not dict_type:
            top = nodes.Scalar(raw, top.origin, quoted=True)  # a prompt: "Q: who?"
        if isinstance(top, nodes.Scalar):
            try:
                if scalars:
                    return read_scalar(scalars, top)
            except BadValue:
                if not shorthand:
                    raise
            if list_type is not None and not shorthand:
                if not top.quoted and top.text.lstrip().startswith("["):
                    raise BadValue("is not a complete list: write [a, b]")
                return self._list(list_type, [[top]], path)
        if shorthand and not isinstance(top, nodes.Sequence):
            return self._choice(record, layers, path)
        mappings = [layer for layer in layers if isinstance(layer, nodes.Mapping)]
        if record is not None and isinstance(top, nodes.Mapping):
            return self._dataclass(record, mappings, path)
        if dict_type is not None and isinstance(top, nodes.Mapping):
            return self._dict(dict_type, mappings, path)
        kinds = " or ".join(dict.fromkeys(_kind(tp) for tp in types if tp is not _NONE))
        raise BadValue(f"must be {kinds}")

    def _list(self, tp: Any, items: list[Stack], path: str) -> Any:
        values = [
            self.convert(fields.element(tp, i), stack, fields.join(path, i))
            for i, stack in enumerate(items)
        ]
        if nodes.BAD in values:
            return nodes.BAD
        if (get_origin(tp) or tp) is list:
            return values
        args = get_args(tp)
        if args and Ellipsis not in args and len(args) != len(values):
            raise BadValue(f"must be a list of {len(args)}")
        return tuple(values)

    def _dict(self, tp: Any, layers: list[nodes.Mapping], path: str) -> Any:
        _, value_type = get_args(tp) or (str, Any)
        values = {}
        for key in dict.fromkeys(key for layer in layers for key in layer.items):
            stack = [layer.items[key] for layer in layers if key in layer.items]
            values[key] = self.convert(value_type, stack, fields.join(path, key))
        return nodes.BAD if nodes.BAD in values.values() else values

    def _choice(self, registry: Any, layers: Stack, path: str) -> Any:
        known = registry.get_known_choices()
        name, mappings, dropped = settle(registry, layers)
        for layer in dropped:
            lost = [key for key in layer.items if key != "type"]
            if lost and not isinstance(layer.items[lost[0]], nodes.Default):
                origin = layer.items[lost[0]].origin
                notice = f"{', '.join(lost)} ({origin}) no longer counts"
                self.notices.append(f"{path}.type is now {name}: {notice}")
        if name is not None and name not in known:
            load_plugins(self.notices)
        place = fields.join(path, "type")
        for layer in mappings:
            if "type" in layer.items:
                self.decided[place] = layer.items["type"]
        names = ", ".join(sorted(known)) or "none"
        if name is None:
            return self._fail(place, "is required", f"choose {names}")
        if name not in known:
            advice = self.hint or did_you_mean(name, known)
            return self._fail(place, f"is not a known type; known: {names}", advice)
        return self._dataclass(known[name], mappings, path, registry)

    def _dataclass(
        self, cls: type, layers: list[nodes.Mapping], path: str, registry: Any = None
    ) -> Any:
        values: dict[str, Any] = {}
        names, type_name = [item.name for item in fields.settings(cls)], fields.choice_name(cls)
        for item in fields.settings(cls):
            place, default = fields.join(path, item.name), item.default
            stack = [layer.items[item.name] for layer in layers if item.name in layer.items]
            if default is not MISSING and not any(
                isinstance(node, nodes.Default) for node in stack
            ):
                stack.insert(0, nodes.Default(default))
            if stack:
                values[item.name] = self.convert(item.type, stack, place)
                continue
            values[item.name] = nodes.BAD
            if not self.is_partial:
                rule = f"is required ({fields.type_text(item.type)})"
                self._fail(place, rule, f"set it in the file or with --{place}")
        good = nodes.BAD not in values.values()
        for layer in layers:
            for key, node in layer.items.items():
                if key in names or (key == "type" and nodes.written(node) == type_name):
                    continue
                place = fields.join(path, key)
                if self._is_ignored(place, node):
                    continue
                good = False
                self.decided[place] = node
                if key == "type" and type_name is not None:
                    self._fail(place, f"must be {type_name} here")
                else:
                    self._unknown(key, names, path, type_name, registry)
        return self._build(cls, values, path) if good else nodes.BAD

    def _is_ignored(self, path: str, node: nodes.Node) -> bool:
        """Whether an unknown setting is one of another program's that does nothing here."""
        row = self.foreign.find(path)
        if row is None:
            return False
        problem = self.foreign.problem(row, path, node)
        if problem is not None:
            self.problems.append(problem)
        elif notice := self.foreign.notice(row, path, node):
            self.notices.append(notice)
        return True

    def _build(self, cls: type, values: dict[str, Any], path: str) -> Any:
        try:
            value = cls(**values)
        except (TypeError, ValueError) as error:  # a user's own __post_init__
            return self._fail(path, str(error))
        for problem in _own_problems(value):
            self.problems.append(self._completed(problem, value, path))
        return value

    def _completed(self, problem: Problem, value: Any, path: str) -> Problem:
        """Fill in the path, the value as written, and its origin."""
        setting = fields.join(path, problem.setting)
        node = self.decided.get(setting)
        text = problem.value
        if text is None:
            text = text_at(value, problem.setting) if node is None else nodes.written(node)
        origin = problem.origin or (node and node.origin) or (text and "default")
        return Problem(setting, problem.rule, problem.advice, text, origin)

    def _unknown(
        self, key: str, names: list[str], path: str, type_name: str | None, registry: Any
    ) -> None:
        place, prefix = fields.join(path, key), f"{path}." if path else ""
        others = registry.get_known_choices() if registry is not None else {}
        owners = [
            name for name, cls in others.items() if any(f.name == key for f in fields.settings(cls))
        ]
        elsewhere = [n for n in self.known if n.rpartition(".")[2] == key and n != place]
        aliases = [n.removeprefix(prefix) for n in self.known if n.startswith(prefix)]
        rule = "is not a setting" + (f" of type {type_name}" if type_name else "")
        if owners:
            advice = f"it belongs to type {' and '.join(owners)}"
        elif elsewhere:
            nearest = min(elsewhere, key=lambda name: (name.count("."), name))
            advice = f"did you mean {nearest}?"
        elif found := did_you_mean(key, names or aliases) or did_you_mean(key, aliases):
            advice = found
        else:
            advice = f"known here: {', '.join(names)}" if len(names) <= 12 else ""
        self._fail(place, rule, advice)


def _by_position(cls: Any, node: nodes.Node) -> nodes.Node:
    """`[0, {a: 1}]` as the mapping of the fields of `cls`, where it has as many."""
    names = [item.name for item in fields.settings(cls)]
    if not isinstance(node, nodes.Sequence) or len(node.items) != len(names):
        return node
    return nodes.Mapping(dict(zip(names, node.items, strict=True)), node.origin)


def find_problems(value: Any) -> Iterator[Problem]:
    """The problems of a value and of everything below it; paths relative to `value`."""
    yield from _own_problems(value)
    for key, child in nodes.children(value):
        for problem in find_problems(child):
            yield replace(problem, setting=fields.join(str(key), problem.setting))


def text_at(value: Any, setting: str) -> str | None:
    """The value below `setting` as text, or None where the path leads nowhere."""
    for key in filter(None, setting.split(".")):
        parts = {str(name): child for name, child in nodes.children(value)}
        if key not in parts:
            return None
        value = parts[key]
    return None if fields.is_record(type(value)) else nodes.value_text(value)


def load_plugins(notices: list[str]) -> None:
    """Import the entry points of group `ostro.plugins`, once; they register their choices."""
    global _loaded_plugins
    if _loaded_plugins:
        return
    _loaded_plugins = True
    for point in entry_points(group="ostro.plugins"):
        try:
            point.load()
        except Exception as error:  # somebody else's package must not stop this run
            notices.append(f"plugin {point.name} was not loaded: {type(error).__name__}: {error}")


def _own_problems(value: Any) -> list[Problem]:
    own: Any = getattr(value, "problems", None) if is_dataclass(value) else None
    return [] if own is None else list(own())


def _kind(tp: Any) -> str:
    if fields.is_list(tp):
        return "a list"
    if fields.is_dict(tp):
        return "a mapping"
    if fields.is_record(tp):
        return "a mapping of settings"
    return {str: "text", int: "a whole number", float: "a number"}.get(tp) or fields.type_text(tp)
