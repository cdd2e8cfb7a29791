"""One piece of a tensor as torch.save writes it: a zip archive with a pickled header beside the bare numbers.

The header is read, not unpickled, and the archive must be as torch writes it: nothing compressed, so that no few bytes
become many, and nothing that reaches beyond its end.
"""

from __future__ import annotations

import io
import math
import struct
import sys
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from stretto.checkpoint.inert import Made, Outside, decode
from stretto.reading import UnreadableError

_REBUILD: Final = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_NAMES: Final = frozenset(
    {*_REBUILD, "collections.OrderedDict", "torch.storage.UntypedStorage"}
    | {f"torch.{name}" for name, each in vars(torch).items() if isinstance(each, torch.dtype)}
    | {f"torch.{name}" for name in vars(torch) if name.endswith("Storage")}
)
_MOST_MEMBERS: Final = 32
_LONGEST_HEADER: Final = 2**16


def unpack(content: bytes, dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
    """The tensor of `dtype` and `sizes` in an archive, on its memory: to be read only.

    Raises UnreadableError when the archive is damaged or holds another one.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # a view of the bytes, no copy
            members = archive.infolist()
            if len(members) > _MOST_MEMBERS or any(
                m.compress_type != zipfile.ZIP_STORED or not m.file_size == m.compress_size <= len(content)
                for m in members
            ):
                raise UnreadableError("its archive is not one that torch.save writes")
            by_name = {m.filename.partition("/")[2]: m for m in members}
            header, data, order = by_name["data.pkl"], by_name["data/0"], by_name.get("byteorder")
            if order is not None and archive.read(order).decode() != sys.byteorder:
                raise UnreadableError("its numbers have another byte order than this machine's")
            if header.file_size > _LONGEST_HEADER:
                raise UnreadableError(f"the header of a tensor has {header.file_size:,} bytes")
            offset, shape, strides = _described(decode(archive.read(header), _NAMES))
    except (zipfile.BadZipFile, NotImplementedError, KeyError, ValueError, RuntimeError, EOFError) as error:
        raise error if isinstance(error, UnreadableError) else UnreadableError(f"its archive: {error}") from error
    n, rest = divmod(data.file_size, dtype.itemsize)
    start = _start_of_data(content, data)
    if rest or not n > 0 or start + data.file_size > len(content):
        raise UnreadableError(f"{data.file_size:,} bytes are no tensor of {dtype}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if tuple(sizes) != shape or math.prod(shape) < 1 or not 0 <= offset <= last < n:
        raise UnreadableError(f"a tensor of {tuple(sizes)} was to be there, not one of {shape} in {n:,} elements")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        flat = torch.frombuffer(content, dtype=dtype, count=n, offset=start)
    return flat.as_strided(shape, strides, offset)


def _described(made: Any) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Offset, shape and strides, in elements, of the one tensor of a header."""
    if not isinstance(made, Made) or made.name not in _REBUILD or len(made.args) < 4:
        raise UnreadableError("its archive holds no plain tensor")
    storage, offset, shape, strides = made.args[:4]
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Outside) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise UnreadableError("the header of a tensor has something else than sizes")
    return offset, shape, strides


def _start_of_data(content: bytes, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin: after its local header, its name and its padding."""
    fixed = 30
    name, extra = struct.unpack_from("<HH", content, member.header_offset + fixed - 4)
    return int(member.header_offset + fixed + name + extra)
