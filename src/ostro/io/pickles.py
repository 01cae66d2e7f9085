"""Pickles that may be damaged or forged, looked through before anything is made of them.

A few hundred bytes can stand for 2**60 values, as a list may hold another one twice, and so on;
one with tuples as keys keeps Python busy for ever in C code, deaf to signals. `scan` plays the
opcodes with `Part`s in place of values, each of which knows how large the value would be if all
that it repeats were written out, and refuses what is out of proportion to the pickle. It takes
time and memory in proportion to it, and calls nothing.
"""

import pickle
import pickletools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_REPEATS = 64  # how much larger than the pickle the values in it may be
_SLACK = 1 << 20  # and this many bytes besides
_DEPTH = 64
_LONG = 1024  # bits of a number
_KEY = 64  # bits of a number that is a key: longer ones may all have one hash

_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_CONTAINERS = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set", "LIST": "list",
               "DICT": "dict", "FROZENSET": "set"}  # fmt: skip
_FILLS = {"APPEND": "list", "APPENDS": "list", "SETITEM": "dict", "SETITEMS": "dict",
          "ADDITEMS": "set"}  # fmt: skip
_NO_EFFECT = {"PROTO", "FRAME", "STOP"}
_PLAIN_KINDS = {"int", "int_or_bool", "float", "bool", "None", "str", "bytes", "bytes_or_str",
                "bytearray"}  # fmt: skip
_PLAIN = {
    op.name
    for op in pickletools.opcodes
    if not op.stack_before and op.stack_after and op.stack_after[0].name in _PLAIN_KINDS
}


@dataclass(eq=False, slots=True)
class Part:
    """What a value of the pickle would be."""

    kind: str
    """`plain` (a text, a number, null), `list`, `dict`, `set`, `tuple`, `global`, or another one
    that a `Call` or a `Load` has chosen."""
    value: Any = None
    """A plain value; the parts of a tuple or list; the dotted name of a global."""
    size: int = 8
    """Bytes of all that it holds, roughly, were it written out."""
    depth: int = 0
    is_held: bool = False
    """Something else holds it, so it must not grow any more: sizes would be wrong, or endless."""


Call = Callable[[str, Part], Part]
"""Name of a function and its tuple of arguments to what it would return, or an error."""
Load = Callable[[Part], Part]
"""The id of an object outside of the pickle to what it stands for, or an error."""


def refuse_call(name: str, arguments: Part) -> Part:
    """A `Call` for pickles that call nothing."""
    raise pickle.UnpicklingError(
        f"it asks for {name}, and of a pickle only dicts, lists, texts and numbers are read"
    )


def refuse_load(name: Part) -> Part:
    """A `Load` for pickles that stand alone."""
    raise pickle.UnpicklingError("it asks for objects that lie outside of it")


def scan(data: bytes, call: Call = refuse_call, load: Load = refuse_load) -> None:
    """Look through a pickle; a `ValueError` or `UnpicklingError` says why it must not be read."""
    machine = _Machine(len(data), call, load)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.play(opcode, argument)
    except IndexError as error:
        raise ValueError("the pickle is damaged: it takes what is not there") from error


def items(part: Part) -> Sequence[Part]:
    """The parts of a tuple or list."""
    return part.value or () if part.kind in ("tuple", "list") else ()


class _Machine:
    def __init__(self, num_bytes: int, call: Call, load: Load):
        self._num_bytes, self._call, self._load = num_bytes, call, load
        self._limit = num_bytes * _REPEATS + _SLACK
        self._called = 0
        self._stack: list[Part | None] = []  # None is a mark
        self._memo: dict[int, Part] = {}

    def play(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name == "MARK":
            self._stack.append(None)
        elif name in _PUTS or name == "MEMOIZE":
            self._remember(len(self._memo) if name == "MEMOIZE" else argument)
        elif name in _GETS:
            self._get(argument)
        elif name == "DUP":
            self._stack.append(self._stack[-1])
        elif name == "POP":
            self._stack.pop()
        elif name == "POP_MARK":
            list(self._to_mark())
        elif name in _FILLS:
            self._fill(name)
        elif name in _TUPLES or name in _CONTAINERS:
            self._build(opcode)
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID"):
            self._object(name, argument)
        elif name in _PLAIN:
            self._stack.append(self._plain(argument))
        elif name not in _NO_EFFECT:
            raise pickle.UnpicklingError(f"it uses {name}, which makes objects of classes")

    def _remember(self, index: int) -> None:
        if not 0 <= index <= self._num_bytes:  # Python's own would take memory up to there
            raise ValueError(f"the pickle is damaged: {index} is too large for its memo")
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"the pickle is damaged: nothing is at {index} of its memo")
        self._stack.append(self._memo[index])

    def _top(self) -> Part:
        part = self._stack[-1]
        if part is None:
            raise IndexError
        return part

    def _pop(self) -> Part:
        part = self._top()
        self._stack.pop()
        return part

    def _to_mark(self) -> Iterator[Part]:
        """What lies above the last mark, the last first; both are taken off."""
        while (part := self._stack.pop()) is not None:
            yield part

    def _plain(self, value: Any) -> Part:
        if isinstance(value, int) and value.bit_length() > _LONG:
            raise ValueError(f"it holds a number of {value.bit_length()} bits")
        return Part("plain", value, 8 + len(value) if isinstance(value, str | bytes) else 8)

    def _build(self, opcode: pickletools.OpcodeInfo) -> None:
        if pickletools.markobject in opcode.stack_before:
            parts = list(self._to_mark())[::-1]
        else:
            parts = [self._pop() for _ in opcode.stack_before][::-1]
        part = Part(_CONTAINERS.get(opcode.name, "tuple"))
        self._hold(part, parts)
        self._stack.append(part)

    def _fill(self, name: str) -> None:
        if name in ("APPEND", "SETITEM"):
            parts = [self._pop() for _ in range(1 if name == "APPEND" else 2)][::-1]
        else:
            parts = list(self._to_mark())[::-1]
        part = self._top()
        if part.kind != _FILLS[name]:
            raise ValueError(f"the pickle is damaged: {name} of a {part.kind}")
        self._hold(part, parts)

    def _hold(self, part: Part, parts: Sequence[Part]) -> None:
        if part.kind in ("dict", "set"):
            for key in parts[:: 2 if part.kind == "dict" else 1]:
                check_key(key)
        elif part.kind in ("tuple", "list"):
            part.value = part.value or []
            part.value += parts
        for child in parts:
            child.is_held = True
            part.size += child.size
            part.depth = max(part.depth, child.depth + 1)
        if part.is_held and parts:
            raise ValueError("it changes, or holds, what already lies in something else")
        if part.depth > _DEPTH:
            raise ValueError(f"it nests deeper than {_DEPTH} levels")
        if part.size > self._limit:
            raise ValueError("it holds more than its size allows once what it repeats is counted")

    def _object(self, name: str, argument: Any) -> None:
        if name == "GLOBAL":
            self._stack.append(Part("global", argument.replace(" ", ".", 1)))
            return
        last = self._pop()
        if name == "STACK_GLOBAL":
            module = self._pop()
            if not (isinstance(module.value, str) and isinstance(last.value, str)):
                raise ValueError("the pickle is damaged: a global has no name")
            self._stack.append(Part("global", f"{module.value}.{last.value}"))
            return
        self._called += last.size
        if self._called > self._limit:
            raise ValueError("it holds more than its size allows once what it repeats is counted")
        last.is_held = True
        if name == "BINPERSID":
            self._stack.append(self._load(last))
        elif name == "BUILD":  # the attributes of an ordered dict: those of a state_dict's
            target = self._top()
            if target.kind != "dict" or target.value != "attributes" or last.kind != "dict":
                raise pickle.UnpicklingError("it sets the attributes of an object")
            self._hold(target, [self._plain("state"), last])
        else:
            function = self._pop()
            if function.kind != "global":
                raise ValueError("the pickle is damaged: it calls what is no function")
            made = self._call(function.value, last)
            made.size += last.size
            made.depth = max(made.depth, last.depth)
            self._stack.append(made)


def check_key(part: Part) -> None:
    """Refuse what must not be a key: of texts and numbers of 64 bits few have one hash."""
    value = part.value
    if part.kind != "plain" or (isinstance(value, int) and value.bit_length() > _KEY):
        raise ValueError("a key in it is neither a text nor a number of at most 64 bits")
