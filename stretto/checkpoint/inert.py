"""A pickle as inert data: nothing that it names is imported, and nothing is called.

`.metadata` and the header of each tensor are pickles, as torch writes them, and a pickle may name any function. A
checkpoint is data that people hand to each other. So its instructions are read with `pickletools.genops` and carried
out here on plain values: what a pickle would make is a `Made`, which has the name, the arguments and the state.
Instructions that torch's own files have no use for are errors, as is every name outside a given list.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from stretto.reading import UnreadableError, shown

MOST_INSTRUCTIONS: Final = 2**27
"""Some 3 million pieces of tensors."""


@dataclass(frozen=True)
class Named:
    """Something that a pickle names, as in `torch.Size`."""

    name: str


@dataclass(eq=False)
class Made:
    """What a pickle would call `name` with `args` for, and then give `state`."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


@dataclass(eq=False)
class Outside:
    """What the program that reads the pickle would have to fetch elsewhere: a tensor's storage."""

    key: Any


class _Mark:
    """Where the items of the next list, tuple or dictionary begin."""


_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS: Final = frozenset(["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE"])
_TUPLES: Final = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def decode(pickled: bytes, names: Collection[str]) -> Any:
    """What a pickle says. Raises UnreadableError for anything that is not a pickle of plain data and `names`."""
    try:
        return _Decoder(names).run(pickled)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(f"it is damaged ({type(error).__name__}: {shown(str(error))})") from error


class _Decoder:
    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """Carry out all instructions; the value on which they stop."""
        for n, (code, arg, _) in enumerate(pickletools.genops(pickled)):
            if code.name == "STOP":
                return self.stack.pop()
            if n > MOST_INSTRUCTIONS:
                raise UnreadableError(f"it has more than {MOST_INSTRUCTIONS:,} instructions")
            self.do(code.name, arg)
        raise UnreadableError("it does not end")

    def do(self, name: str, arg: Any) -> None:
        """One instruction, by its name in `pickletools`."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(arg)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self.take(_TUPLES[name])))
        elif name == "MARK":
            stack.append(_Mark)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name not in ("PROTO", "FRAME"):
            self.make(name, arg)

    def make(self, name: str, arg: Any) -> None:
        """One that makes something of what is on the stack."""
        stack = self.stack
        if name in ("BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            items = self.take({"BUILD": 1, "APPEND": 1, "SETITEM": 2}.get(name))
            target = stack[-1]
            if name == "BUILD":
                _typed(target, Made).state = items[0]
            elif name.startswith("APPEND"):
                _typed(target, list).extend(items)
            else:
                _typed(target, dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "TUPLE":
            stack.append(tuple(self.take(None)))
        elif name in ("REDUCE", "NEWOBJ"):
            what, args = self.take(2)
            stack.append(Made(_typed(what, Named).name, _typed(args, tuple)))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            said = arg.replace(" ", ".", 1) if name == "GLOBAL" else ".".join(self.take(2))
            if said not in self.names:
                raise UnreadableError(f"it names {shown(said)}, which no checkpoint needs")
            stack.append(Named(said))
        elif name == "BINPERSID":
            stack.append(Outside(stack.pop()))
        else:
            raise UnreadableError(f"it has the instruction {name}, which no checkpoint needs")

    def take(self, n: int | None) -> list[Any]:
        """The last `n` values of the stack; None: all from the last mark on, which goes too."""
        at = len(self.stack) - n if n is not None else _last_mark(self.stack)
        if at < 0:
            raise UnreadableError("it takes values that are not there")
        items = self.stack[at + (n is None) :]
        del self.stack[at:]
        return items


def _last_mark(stack: list[Any]) -> int:
    return next((i for i in reversed(range(len(stack))) if stack[i] is _Mark), -1)


def _typed(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise UnreadableError(f"it makes a {type(value).__name__} where a {kind.__name__} must be")
    return value
