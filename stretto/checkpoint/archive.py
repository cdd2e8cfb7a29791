"""One piece of a tensor as torch.save writes it: a zip archive with a pickled header beside the bare numbers.

Its size and the place of the numbers in it follow from dtype and shape, so pieces can be written in any order. As with
`torch.serialization.set_crc32_options(False)`, the archive has no CRC-32 of the numbers: torch does not look at it, and
`index.jsonl` has checksums of them that are computed several times as fast.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from stretto.checkpoint.pickled import Made, Named, Persistent, pickled

ALIGNED = 64
"""Numbers begin at multiples of this in an archive, as torch aligns them."""


@dataclass(frozen=True)
class Archive:
    """What stands before and after the numbers of a piece."""

    before: bytes
    after: bytes


def archive(dtype: str, sizes: Sequence[int], nbytes: int) -> Archive:
    """The archive around `nbytes` of contiguous numbers of a torch dtype such as "bfloat16"."""
    small = {
        "archive/data.pkl": header(dtype, sizes, nbytes),
        "archive/byteorder": sys.byteorder.encode(),
        "archive/version": b"3\n",
    }
    before, central = bytearray(), bytearray()
    for name, content in small.items():
        central += _central(name, len(content), zlib.crc32(content), len(before))
        before += _local(name, len(content), zlib.crc32(content), b"") + content
    name = "archive/data/0"
    central += _central(name, nbytes, 0, len(before))
    size = _zip64(nbytes, nbytes) if nbytes >= _WIDE else b""
    bare = len(before) + 30 + len(name) + len(size) + 4
    padding = -bare % ALIGNED
    before += _local(name, nbytes, 0, size + struct.pack("<2sH", b"FB", padding) + b"Z" * padding)
    return Archive(bytes(before), bytes(central) + _end(len(small) + 1, len(central), len(before) + nbytes))


def header(dtype: str, sizes: Sequence[int], nbytes: int) -> bytes:
    """`data.pkl`: a tensor of all of one storage."""
    strides = [*accumulate(reversed(sizes[1:]), lambda a, b: a * b, initial=1)][::-1] if sizes else []
    storage = Persistent(("storage", Named("torch.storage", "UntypedStorage"), "0", "cpu", nbytes))
    hooks = Made(Named("collections", "OrderedDict"))
    args = (storage, 0, tuple(sizes), tuple(strides), False, hooks, Named("torch", dtype))
    return pickled(Made(Named("torch._utils", "_rebuild_tensor_v3"), args))


_WIDE = 2**32 - 1
_DATE = 0x21
"""1 January 1980: the same bytes each time."""


def _zip64(*values: int) -> bytes:
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)


def _local(name: str, size: int, crc: int, extra: bytes) -> bytes:
    short, version = (_WIDE, 45) if size >= _WIDE else (size, 20)
    fixed = struct.pack("<4s5H3I2H", b"PK\3\4", version, 0, 0, 0, _DATE, crc, short, short, len(name), len(extra))
    return fixed + name.encode() + extra


def _central(name: str, size: int, crc: int, at: int) -> bytes:
    wide = size >= _WIDE
    short, version, extra = (_WIDE, 45, _zip64(size, size)) if wide else (size, 20, b"")
    lengths = (len(name), len(extra), 0, 0, 0)
    fixed = struct.pack("<4s6H3I5H2I", b"PK\1\2", version, version, 0, 0, 0, _DATE, crc, short, short, *lengths, 0, at)
    return fixed + name.encode() + extra


def _end(members: int, size: int, at: int) -> bytes:
    wide = b""
    if at >= _WIDE:
        wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, members, members, size, at)
        wide += struct.pack("<4sIQI", b"PK\6\7", 0, at + size, 1)
    return wide + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, members, members, size, min(at, _WIDE), 0)
