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
from ostro.config.nodes import (
    Bad,
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
class _Stack:
    """What the layers say about one value, lowest first, above its default."""

    layers: list[Node]
    default: Any = field(default_factory=lambda: MISSING)


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

    def convert(self, tp: Any, layers: list[Node], path: str, default: Any = MISSING) -> Any:
        """The value of type `tp`, or BAD."""
        layers = [layer for node in layers for layer in explode(node)]
        if any(isinstance(layer, Bad) for layer in layers):
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
        return self._choose(types, layers, path, default)

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

    def _choose(self, types: tuple, layers: list[Node], path: str, default: Any) -> Any:
        """Pick the member of a union by the kind of node, then convert."""
        lists = [tp for tp in types if is_list(tp)]
        records = [tp for tp in types if is_record(tp)]
        dicts = [tp for tp in types if is_dict(tp)]
        scalars = [tp for tp in types if tp not in (*lists, *records, *dicts, _NONE)]
        registry = next((tp for tp in records if is_registry(tp)), None)
        if lists:
            inner = next((m for m in members(element(lists[0])) if is_registry(m)), registry)
            items, single = self._fold(layers, default, inner, path)
            if items is BAD:
                return BAD
            if items is not None:
                return self._list(lists[0], items, path)
            layers, default = single.layers, single.default
        top = layers[-1] if layers else None
        raw = getattr(top, "raw", None)
        if raw is not None and str in scalars and not records and not dicts:
            top = Scalar(
                raw, top.origin, quoted=True
            )  # a prompt such as "Q: who?"
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
                return self._list(lists[0], [_Stack([top])], path)
        if isinstance(top, (Mapping, Entry)) or registry is not None:
            if records:
                return self._record(self._nearest(records, layers), layers, path, default)
            if dicts:
                return self._dict(dicts[0], layers, path, default)
        kinds = " or ".join(_kind(tp) for tp in types if tp is not _NONE)
        return self._fail(path, f"must be {kinds}")

    def _fold(
        self, layers: list[Node], default: Any, registry: Any, path: str
    ) -> tuple[list[_Stack] | None, _Stack]:
        """Merge the layers of a list, or of one element or a list of them."""
        single = _Stack([], default)
        items: list[_Stack] | None = None
        if isinstance(default, (list, tuple)):
            items = [_Stack([], value) for value in default]
        for layer in layers:
            if isinstance(layer, Sequence):
                items = [_Stack([item]) for item in layer.items]
            elif isinstance(layer, Entry) and registry is not None:
                items = self._fold_entry(layer, registry, items, single, path)
            elif items is not None and (indices := _indices(layer, len(items))) is not None:
                assert isinstance(layer, Mapping)
                for index, node in zip(indices, layer.items.values(), strict=True):
                    items += [_Stack([])] * (index == len(items))
                    items[index].layers.append(node)
            elif items is not None:
                if layer.origin.startswith("--") and "type" not in _items(layer):
                    rule = f"is a list of {len(items)}"
                    name = next(iter(_items(layer)), "")
                    self._fail(path, rule, f"name one: --{join(join(path, 0), name)}")
                    return BAD, single
                items, single = None, _Stack([layer])
            else:
                single.layers.append(layer)
        return items, single

    def _fold_entry(
        self, entry: Entry, registry: Any, items: list[_Stack] | None, single: _Stack, path: str
    ) -> list[_Stack] | None:
        """Add the settings to the element of their type; join it to the others if it is new."""
        stacks = items if items is not None else [single]
        for stack in stacks:
            if self._type(registry, stack, path)[0] == entry.type:
                stack.layers.append(entry)
                return items
        fresh = _Stack([entry])
        if items is None and not single.layers and single.default in (MISSING, None):
            single.layers, single.default = fresh.layers, MISSING
            return None
        return [*([_Stack(list(single.layers), single.default)] if items is None else items), fresh]

    def _list(self, tp: Any, items: list[_Stack], path: str) -> Any:
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

    def _dict(self, tp: Any, layers: list[Node], path: str, default: Any) -> Any:
        if not all(isinstance(layer, (Mapping, Entry)) for layer in layers):
            layers = layers[-1:]
        key_type, value_type = get_args(tp) or (str, Any)
        defaults = default if isinstance(default, dict) else {}
        result = {}
        names = dict.fromkeys([*map(str, defaults), *(k for la in layers for k in _items(la))])
        by_name = {str(key): value for key, value in defaults.items()}
        for name in names:
            stack = [_items(layer)[name] for layer in layers if name in _items(layer)]
            place = join(path, name)
            try:
                node = Scalar(name, stack[-1].origin if stack else "default", quoted=True)
                key = read_scalar([key_type], node) if key_type is not Any else name
            except BadValue as error:
                key = self._fail(place, f"{name} as a name {error}", error.advice)
            value = self.convert(value_type, stack, place, by_name.get(name, MISSING))
            if key is BAD or value is BAD:
                result = BAD
            elif result is not BAD:
                result[key] = value
        return result

    def _nearest(self, records: list[Any], layers: list[Node]) -> Any:
        """Of several dataclasses, the one that knows most of the keys given."""
        if len(records) == 1:
            return records[0]
        given = {key for layer in layers for key in _items(layer)}

        def num_unknown(tp: Any) -> int:
            if is_registry(tp):
                return 0 if "type" in given else 1
            return len(given - {field.name for field in settable(tp)})

        return min(records, key=num_unknown)

    def _type(
        self, registry: Any, stack: _Stack, path: str
    ) -> tuple[str | None, list[Mapping], Any]:
        """The `type` in force after all layers, the layers that count, and their default."""
        kept: list[Mapping] = []
        default, name = stack.default, registry.default_choice_name()
        if type(default) in registry.get_known_choices().values():
            name = choice_name(type(default))
        for layer in (part for node in stack.layers for part in explode(node)):
            mapping = layer.mapping if isinstance(layer, Entry) else layer
            if isinstance(layer, Scalar):
                mapping = self._shorthand(registry, layer, path)
            given = mapping.items.get("type") if isinstance(mapping, Mapping) else None
            if isinstance(given, Scalar):
                if name is not None and given.text != name:
                    kept, default = [], MISSING
                name = given.text
            kept.append(mapping)
        return name, kept, default

    def _shorthand(self, registry: Any, node: Scalar, path: str) -> Node:
        """What a bare word stands for in a registry: `cosine` is `{type: cosine}`."""
        read = getattr(registry, "from_scalar", lambda text: {"type": text})
        try:
            return from_plain(read(node.text), node.origin)
        except ValueError as error:
            self._fail(path, str(error))
            return Bad(node.origin)

    def _record(self, tp: Any, layers: list[Node], path: str, default: Any) -> Any:
        if isinstance(layers[-1], Scalar) and not is_registry(tp):
            return self._fail(path, f"must be {_kind(tp)}")
        if not is_registry(tp):
            name = choice_name(tp)
            kept = [m for m in layers if isinstance(m, Mapping)]
            kept += [m.mapping for m in layers if isinstance(m, Entry)]
            return self._dataclass(tp, kept, path, default, name)
        name, kept, default = self._type(tp, _Stack(layers, default), path)
        if any(isinstance(layer, Bad) for layer in kept):
            return BAD
        self._tell_dropped(layers, kept, path, name)
        known = tp.get_known_choices()
        if name is not None and name not in known:
            load_plugins(self.notices)
        for mapping in kept:
            if "type" in mapping.items:
                kind = mapping.items["type"]
                self.origins[f"{path}.type"] = kind.origin
                self.texts[f"{path}.type"] = written(kind)
        if name is None:
            return self._fail(f"{path}.type", "is required", f"choose {', '.join(known)}")
        if name not in known:
            advice = did_you_mean(name, known)
            rule = f"is not a known type; known: {', '.join(sorted(known)) or 'none'}"
            return self._fail(f"{path}.type", rule, advice)
        return self._dataclass(known[name], kept, path, default, name, tp)

    def _tell_dropped(self, layers: list[Node], kept: list, path: str, name: str | None) -> None:
        """A notice for the settings of another type that the new type leaves behind."""
        kept_ids = {id(node) for mapping in kept for node in mapping.items.values()}
        for layer in layers:
            mine = {k: v for k, v in _items(layer).items() if k != "type" and id(v) not in kept_ids}
            if mine:
                origin = next(iter(mine.values())).origin
                self.notices.append(
                    f"{path}.type is now {name}: {', '.join(mine)} ({origin}) no longer counts"
                )

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
        owners = [
            name
            for name, cls in others.items()
            if is_dataclass(cls) and any(f.name == key for f in settable(cls))
        ]
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


def children(value: Any) -> list[tuple[str | int, Any]]:
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
    own = getattr(value, "problems", None) if is_dataclass(value) else None
    return list(own()) if callable(own) else []


def _items(node: Node) -> dict[str, Node]:
    mapping = node.mapping if isinstance(node, Entry) else node
    return mapping.items if isinstance(mapping, Mapping) else {}


def _indices(node: Node, length: int) -> list[int] | None:
    """The positions that a mapping such as `{0: ...}` names in a list, if all do."""
    if not isinstance(node, Mapping) or not node.items:
        return None
    if not all(key.isdecimal() and len(key) < 6 for key in node.items):
        return None
    indices = [int(key) for key in node.items]
    return indices if sorted(indices)[-1] <= length else None


def _kind(tp: Any) -> str:
    if is_list(tp):
        return "a list"
    if is_dict(tp):
        return "a mapping"
    if is_record(tp):
        return "a mapping of settings"
    return {str: "text", int: "a whole number", float: "a number"}.get(tp) or type_text(tp)
