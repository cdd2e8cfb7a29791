"""Pickles that plain PyTorch reads, written without torch, and without anything that is called or imported here.

`.metadata` and the header of each tensor are pickles in torch's own formats. Stretto writes them so that others can
read a checkpoint, and never reads one: `index.jsonl` tells it the same.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Named:
    """What a pickle names, as in `torch.Size`."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Made:
    """A call of `what` with `args`; with a `state`, an object of the class `what` that gets it."""

    what: Named
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True, eq=False)
class Persistent:
    """What the reader fetches elsewhere: a tensor's storage."""

    key: tuple[Any, ...]


class Raw(bytes):
    """Instructions that leave one value: what there are many of is put together by whoever knows its form."""


def pickled(value: Any, first: Sequence[str | Named] = ()) -> bytes:
    """The pickle of plain values and of those above. `Raw` may refer to what comes `first`, see `remembered`."""
    out = bytearray(pickle.PROTO + b"\x02")
    known: dict[Any, int] = {}
    for each in first:
        _put_known(each, out, known)
        out += pickle.POP
    _put(value, out, known)
    return bytes(out + pickle.STOP)


def remembered(first: Sequence[str | Named]) -> dict[str | Named, bytes]:
    """The instructions for each of what comes first."""
    return {each: pickle.LONG_BINGET + struct.pack("<I", n) for n, each in enumerate(first)}


def text(value: str) -> bytes:
    """The instruction for a text."""
    content = value.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def integers(numbers: Sequence[int]) -> bytes:
    """The instructions for a tuple of numbers."""
    return pickle.MARK + b"".join(map(integer, numbers)) + pickle.TUPLE


def _put(value: Any, out: bytearray, known: dict[Any, int]) -> None:
    if isinstance(value, Raw):
        out += value
    elif isinstance(value, (str, Named)):
        _put_known(value, out, known)
    elif isinstance(value, bool) or value is None:
        out += {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
    elif isinstance(value, int):
        out += integer(value)
    elif isinstance(value, tuple):
        out += pickle.MARK
        for each in value:
            _put(each, out, known)
        out += pickle.TUPLE
    elif isinstance(value, Made):
        _put(value.what, out, known)
        _put(value.args, out, known)
        out += pickle.REDUCE if value.state is None else pickle.NEWOBJ
        if value.state is not None:
            _put(value.state, out, known)
            out += pickle.BUILD
    elif isinstance(value, Persistent):
        _put(value.key, out, known)
        out += pickle.BINPERSID
    else:
        _put_all(value, out, known)


def _put_known(value: str | Named, out: bytearray, known: dict[Any, int]) -> None:
    """A text or name; the second time, where the first one lies."""
    if value in known:
        out += pickle.LONG_BINGET + struct.pack("<I", known[value])
        return
    if isinstance(value, str):
        out += text(value)
    else:
        out += pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
    known[value] = len(known)
    out += pickle.LONG_BINPUT + struct.pack("<I", known[value])


def _put_all(value: Mapping[Any, Any] | Sequence[Any], out: bytearray, known: dict[Any, int]) -> None:
    table = isinstance(value, Mapping)
    out += (pickle.EMPTY_DICT if table else pickle.EMPTY_LIST) + pickle.MARK
    for each in value.items() if isinstance(value, Mapping) else value:
        for part in each if table else (each,):
            _put(part, out, known)
    out += pickle.SETITEMS if table else pickle.APPENDS


def integer(value: int) -> bytes:
    """The instruction for a number."""
    if 0 <= value < 256:
        return pickle.BININT1 + bytes([value])
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(raw)]) + raw
