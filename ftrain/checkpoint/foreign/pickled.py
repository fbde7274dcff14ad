"""The pickles inside of torch's files, read as data: nothing in them is ever called or imported.

A pickle is a program for a small stack machine. This one knows the instructions that build plain data. Where a pickle
names a class or a function, only a name of a given list is taken, and only noted: a call becomes a `Made`, which says
what was to be called with what. Whoever reads it knows the few that it expects.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from typing import Any

from ftrain.errors import CorruptCheckpoint

PICKLE_BYTES_MAX = 1 << 28
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_NOTHING = {"PROTO", "FRAME"}
_DICTS = {"collections.OrderedDict", "builtins.dict"}


class Global:
    """The name of a class or function."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """What would be called with what, or an object of a class with its state. Nothing was called."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None


class Persistent:
    """A reference to something beside the pickle."""

    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key = key


def read_pickle(data: bytes, allowed: Collection[str], where: str) -> Any:
    """The value, of None, bool, int, float, str, bytes, list, tuple, dict, `Global`, `Made` and `Persistent`.

    Raises `CorruptCheckpoint` naming `where` for any name that is not `allowed`, any other instruction, and whatever is
    no pickle. Time and memory are bounded by the size of `data`.
    """
    if len(data) > PICKLE_BYTES_MAX:
        raise CorruptCheckpoint(f"{where}: a pickle of {len(data)} bytes is over the limit of {PICKLE_BYTES_MAX}")
    machine = _Machine(allowed, where)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.result()
            machine.do(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AssertionError, UnicodeDecodeError, OverflowError) as error:
        raise CorruptCheckpoint(f"{where}: not a pickle that ftrain reads: {type(error).__name__}: {error}") from None
    raise CorruptCheckpoint(f"{where}: a pickle without an end")


class _Machine:
    def __init__(self, allowed: Collection[str], where: str) -> None:
        self._allowed = allowed
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise ValueError("it ends with other than one value")
        return self._stack[0]

    def do(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _NOTHING:
            pass
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._global(argument)
        else:
            self._compose(name)

    def _compose(self, name: str) -> None:
        match name:
            case "MARK":
                self._stack.append(_MARK)
            case "EMPTY_DICT":
                self._stack.append({})
            case "EMPTY_LIST":
                self._stack.append([])
            case "EMPTY_TUPLE":
                self._stack.append(())
            case "TUPLE":
                self._stack.append(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self._pop() for _ in range(int(name[-1]))]
                self._stack.append(tuple(reversed(items)))
            case "APPEND" | "APPENDS":
                items = [self._pop()] if name == "APPEND" else self._marked()
                self._list().extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._marked()
                self._dict().update(zip(items[::2], items[1::2], strict=True))
            case "BINPERSID":
                self._stack.append(Persistent(self._pop()))
            case "REDUCE" | "NEWOBJ":
                self._call()
            case "BUILD":
                self._build()
            case _:
                raise ValueError(f"the instruction {name} is not for plain data and tensors")

    def _global(self, argument: Any) -> None:
        if argument is None:
            name, module = self._pop(), self._pop()
            found = f"{module}.{name}"
        else:
            found = str(argument).replace(" ", ".", 1)
        if found not in self._allowed and found not in _DICTS:
            raise CorruptCheckpoint(
                f"{self._where}: refers to {found[:200]}, which is neither a tensor nor plain data; ftrain runs no "
                "code from files: open it with what wrote it, and save tensors and plain data only"
            )
        self._stack.append(Global(found))

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        if function.name in _DICTS:
            self._stack.append({key: value for pairs in arguments for key, value in pairs})
        else:
            self._stack.append(Made(function.name, arguments))

    def _build(self) -> None:
        state = self._pop()
        target = self._top()
        if isinstance(target, Made):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's attributes, as a state dict has them
            raise ValueError("a state for what is no object")

    def _marked(self) -> list[Any]:
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _pop(self) -> Any:
        item = self._stack.pop()
        if item is _MARK:
            raise ValueError("a value is missing")
        return item

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a value is missing")
        return self._stack[-1]

    def _list(self) -> list[Any]:
        target = self._top()
        if not isinstance(target, list):
            raise ValueError("items for what is no list")
        return target

    def _dict(self) -> dict[Any, Any]:
        target = self._top()
        if not isinstance(target, dict):
            raise ValueError("items for what is no dict")
        return target
