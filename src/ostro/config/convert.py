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
from collections.abc import Sequence as Seq
from dataclasses import MISSING, dataclass, field, is_dataclass, replace
from importlib.metadata import entry_points
from typing import Any, get_args, get_origin

from ostro.config.encode import encode
from ostro.config.fields import (
    choice_name,
    default_of,
    element,
    hints,
    is_dict,
    is_list,
    is_record,
    is_registry,
    members,
    settable,
    type_text,
)
from ostro.config.merge import Stack, fold, is_bad, items_of, settle
from ostro.config.nodes import (
    Entry,
    Mapping,
    Node,
    Scalar,
    Sequence,
    explode,
    from_plain,
    join,
    leaves,
    written,
)
from ostro.config.scalars import BadValue, plain, read_scalar
from ostro.errors import Problem, did_you_mean

BAD: Any = object()
"""Stands for a value that could not be converted; the problem is recorded already."""

_NONE = type(None)
_loaded_plugins = False


@dataclass
class Converter:
    """Converts one configuration, collecting problems, notices and origins by dotted path."""

    problems: list[Problem]
    notices: list[str]
    known: list[str] = field(default_factory=list)
    """All dotted names, other spellings included, for suggestions."""
    origins: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    is_partial: bool = False
    """True when a file is missing: what it may hold is then not asked for."""

    def convert(self, tp: Any, layers: Seq[Node], path: str, default: Any = MISSING) -> Any:
        """The value of type `tp`, or BAD."""
        layers = [layer for node in layers for layer in explode(node)]
        if is_bad(layers):
            return BAD
        if not layers:
            self.check(default, path)
            return default
        types = members(tp)
        top = layers[-1]
        self.origins[path], self.texts[path] = top.origin, written(top)
        if types in ((Any,), (object,)):
            self.origins |= {place: leaf.origin for place, leaf in leaves(top, path)}
            return plain(top)
        if isinstance(top, Scalar) and top.is_null:
            if _NONE in types:
                return None
            if top.text or not any(is_record(tp) for tp in types):
                advice = "write [] for none" if any(is_list(tp) for tp in types) else ""
                return self._fail(path, "must not be null", advice)
            layers[-1] = Mapping({}, top.origin)  # `trainer:` with nothing below it
        nulls = [i for i, node in enumerate(layers) if isinstance(node, Scalar) and node.is_null]
        if nulls:
            layers, default = layers[nulls[-1] + 1 :], MISSING
        return self._choose(types, Stack(layers, default), path)

    def check(self, value: Any, path: str) -> None:
        """Run `problems()` of a value that comes from a default, and of all below it."""
        for problem in find_problems(value):
            self.problems.append(self._completed(problem, value, path))

    def origin_of(self, path: str) -> str:
        """Where a setting comes from."""
        return self.origins.get(path, "default")

    def _fail(self, path: str, rule: str, advice: str = "") -> Any:
        origin, text = self.origins.get(path), self.texts.get(path)
        self.problems.append(Problem(path, rule, advice, text, origin))
        return BAD

    def _choose(self, types: tuple, stack: Stack, path: str) -> Any:
        """Pick the member of a union by the kind of node, then convert."""
        lists = [tp for tp in types if is_list(tp)]
        records = [tp for tp in types if is_record(tp)]
        dicts = [tp for tp in types if is_dict(tp)]
        scalars = [tp for tp in types if tp not in (*lists, *records, *dicts, _NONE)]
        registry = next((tp for tp in records if is_registry(tp)), None)
        if lists:
            inner = next((m for m in members(element(lists[0])) if is_registry(m)), registry)
            folded = fold(stack, inner)
            if isinstance(folded, list):
                return self._list(lists[0], folded, path)
            if self._misses_element(stack, records, path):
                return BAD
            stack = folded
        top = stack.layers[-1] if stack.layers else None
        raw = getattr(top, "raw", None)
        if raw is not None and str in scalars and not records and not dicts:
            top = Scalar(raw, stack.layers[-1].origin, quoted=True)  # a prompt: "Q: who?"
        if isinstance(top, Scalar):
            try:
                if scalars:
                    return read_scalar(scalars, top)
            except BadValue as error:
                if registry is None:
                    return self._fail(path, str(error), error.advice)
            if registry is None and lists:
                if not top.quoted and top.text.lstrip().startswith("["):
                    return self._fail(path, "is not a complete list: write [a, b]")
                return self._list(lists[0], [Stack([top])], path)
        if (records or dicts) and registry is None and not scalars and not lists:
            for layer in stack.layers[:-1]:  # hidden below the top, yet a mistake
                if isinstance(layer, (Scalar, Sequence)):
                    self.origins[path], self.texts[path] = layer.origin, written(layer)
                    return self._fail(path, f"must be {_kind((records or dicts)[0])}")
        if records and not isinstance(top, Sequence):
            return self._record(self._nearest(records, stack.layers), stack, path)
        if dicts and isinstance(top, (Mapping, Entry)):
            return self._dict(dicts[0], stack, path)
        kinds = " or ".join(dict.fromkeys(_kind(tp) for tp in types if tp is not _NONE))
        return self._fail(path, f"must be {kinds}")

    def _misses_element(self, stack: Stack, records: list[Any], path: str) -> bool:
        """Refuse `--trainer.tracker.project x` above a list: whose project?"""
        top, below = stack.layers[-1], stack.layers[-2] if len(stack.layers) > 1 else None
        keys = items_of(top)
        if not isinstance(below, Sequence) or not records or not keys or "type" in keys:
            return False
        advice = f"name one: {join(join(path, 0), next(iter(keys)))}"
        self._fail(path, f"is a list of {len(below.items)}", advice)
        return True

    def _list(self, tp: Any, items: list[Stack], path: str) -> Any:
        values = [
            self.convert(element(tp, i), stack.layers, join(path, i), stack.default)
            for i, stack in enumerate(items)
        ]
        if any(value is BAD for value in values):
            return BAD
        if (get_origin(tp) or tp) is tuple:
            args = get_args(tp)
            if args and Ellipsis not in args and len(args) != len(values):
                return self._fail(path, f"must be a list of {len(args)}")
            return tuple(values)
        return values

    def _dict(self, tp: Any, stack: Stack, path: str) -> Any:
        layers = [items_of(layer) for layer in stack.layers]
        key_type, value_type = get_args(tp) or (str, Any)
        defaults = stack.default if isinstance(stack.default, dict) else {}
        defaults = {str(key): value for key, value in defaults.items()}
        result: Any = {}
        for name in dict.fromkeys([*defaults, *(key for layer in layers for key in layer)]):
            nodes = [layer[name] for layer in layers if name in layer]
            place = join(path, name)
            try:
                node = Scalar(name, nodes[-1].origin if nodes else "default", quoted=True)
                key = read_scalar([key_type], node) if key_type is not Any else name
            except BadValue as error:
                key = self._fail(place, f"{name} as a name {error}", error.advice)
            value = self.convert(value_type, nodes, place, defaults.get(name, MISSING))
            if key is BAD or value is BAD:
                result = BAD
            elif result is not BAD:
                result[key] = value
        return result

    def _nearest(self, records: list[Any], layers: Seq[Node]) -> Any:
        """Of several dataclasses, the one that knows most of the keys given."""
        if len(records) == 1:
            return records[0]
        given = {key for layer in layers for key in items_of(layer)}

        def num_unknown(tp: Any) -> int:
            if is_registry(tp):
                return 0 if "type" in given else 1
            return len(given - {field.name for field in settable(tp)})

        return min(records, key=num_unknown)

    def _record(self, tp: Any, stack: Stack, path: str) -> Any:
        if not is_registry(tp):
            if isinstance(stack.layers[-1], Scalar):
                return self._fail(path, f"must be {_kind(tp)}")
            mappings = [m.mapping if isinstance(m, Entry) else m for m in stack.layers]
            kept = [m for m in mappings if isinstance(m, Mapping)]
            return self._dataclass(tp, kept, path, stack.default, choice_name(tp))
        choice, known = settle(tp, stack), tp.get_known_choices()
        if choice.error is not None:
            self.texts[path] = choice.error[0]
            return self._fail(path, choice.error[1])
        for layer in choice.dropped:
            if fields := [key for key in layer.items if key != "type"]:
                origin = layer.items[fields[0]].origin
                notice = f"{', '.join(fields)} ({origin}) no longer counts"
                self.notices.append(f"{path}.type is now {choice.name}: {notice}")
        if choice.name is not None and choice.name not in known:
            load_plugins(self.notices)
        place = join(path, "type")
        for layer in choice.layers:
            if "type" in layer.items:
                self.origins[place] = layer.items["type"].origin
                self.texts[place] = written(layer.items["type"])
        names = ", ".join(sorted(known)) or "none"
        if choice.name is None:
            return self._fail(place, "is required", f"choose {names}")
        if choice.name not in known:
            advice = did_you_mean(choice.name, known)
            return self._fail(place, f"is not a known type; known: {names}", advice)
        cls = known[choice.name]
        return self._dataclass(cls, choice.layers, path, choice.default, choice.name, tp)

    def _dataclass(
        self,
        cls: type,
        layers: list[Mapping],
        path: str,
        default: Any,
        type_name: str | None = None,
        registry: Any = None,
    ) -> Any:
        default = default if type(default) is cls else MISSING
        values, good = {}, True
        names = [f.name for f in settable(cls)]
        for item in settable(cls):
            place = join(path, item.name)
            stack = [layer.items[item.name] for layer in layers if item.name in layer.items]
            start = default_of(item) if default is MISSING else getattr(default, item.name)
            if not stack and start is MISSING:
                good = False
                if self.is_partial:
                    continue
                rule = f"is required ({type_text(hints(cls)[item.name])})"
                advice = f"set it in the file or with --{place}"
                self.problems.append(Problem(place, rule, advice))
                continue
            values[item.name] = self.convert(hints(cls)[item.name], stack, place, start)
            good = good and values[item.name] is not BAD
        for layer in layers:
            for key, node in layer.items.items():
                if key == "type" and key not in names and type_name is not None:
                    good = self._same_type(node, type_name, path) and good
                elif key not in names:
                    good = False
                    self._unknown(key, node, names, path, type_name, registry)
        return self._build(cls, values, path) if good else BAD

    def _same_type(self, node: Node, name: str, path: str) -> bool:
        if isinstance(node, Scalar) and (node.text == name):
            return True
        place = join(path, "type")
        self.origins[place], self.texts[place] = node.origin, written(node)
        self._fail(place, f"must be {name} here")
        return False

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
        setting = join(path, problem.setting)
        text = problem.value
        if text is None:
            text = self.texts.get(setting)
        if text is None:
            text = value_text(value, problem.setting)
        origin = problem.origin or self.origins.get(setting) or (text and "default")
        return Problem(setting, problem.rule, problem.advice, text, origin)

    def _unknown(
        self,
        key: str,
        node: Node,
        names: list[str],
        path: str,
        type_name: str | None,
        registry: Any,
    ) -> None:
        place = join(path, key)
        others = registry.get_known_choices() if registry is not None else {}
        owners = [name for name, cls in others.items() if any(f.name == key for f in settable(cls))]
        elsewhere = [name for name in self.known if name.rpartition(".")[2] == key]
        elsewhere = [name for name in elsewhere if name != place]
        prefix = f"{path}." if path else ""
        aliases = [name.removeprefix(prefix) for name in self.known if name.startswith(prefix)]
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
        self.problems.append(Problem(place, rule, advice, written(node), node.origin))


def find_problems(value: Any) -> Iterator[Problem]:
    """The problems of a value and of everything below it; paths relative to `value`."""
    yield from _own_problems(value)
    for key, child in children(value):
        for problem in find_problems(child):
            yield replace(problem, setting=join(str(key), problem.setting))


def children(value: Any) -> list[tuple[Any, Any]]:
    """The parts of a value: fields, keys or positions."""
    if is_dataclass(value) and not hasattr(value, "from_text"):
        return [(item.name, getattr(value, item.name)) for item in settable(type(value))]
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return []


def value_text(value: Any, setting: str) -> str | None:
    """The value below `setting` as text, or None where the path leads nowhere."""
    for key in filter(None, setting.split(".")):
        found = {str(name): child for name, child in children(value)}
        if key not in found:
            return None
        value = found[key]
    if is_dataclass(value) and not hasattr(value, "from_text"):
        return None
    return written(from_plain(encode(value), ""))


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
    if is_list(tp):
        return "a list"
    if is_dict(tp):
        return "a mapping"
    if is_record(tp):
        return "a mapping of settings"
    return {str: "text", int: "a whole number", float: "a number"}.get(tp) or type_text(tp)
