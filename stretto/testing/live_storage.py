"""What lives of the tensors that a computation makes, to the byte: their storages are watched, whoever holds them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorage(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of its __init_subclass__
    """Within it, every storage that an operation makes is noted; `nbytes` are those that are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[weakref.ref[Any], str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(out, (args, kwargs), f"{func}")
        return out

    def note(self, out: Any, given: Any, what: str) -> None:
        """An operation has made `out` of what it was `given`."""
        known = {x.untyped_storage()._cdata for x in tree_leaves(given) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                before = self._made.get(storage._cdata)
                # An address may be that of a storage that is gone.
                if storage._cdata not in known and (before is None or before[0]() is not storage):
                    self._made[storage._cdata] = weakref.ref(storage), f"{what} {tuple(x.shape)} {x.dtype}"

    @property
    def nbytes(self) -> int:
        """Bytes of all of them together."""
        return sum(nbytes for nbytes, _ in self.table)

    @property
    def table(self) -> list[tuple[int, str]]:
        """Bytes of each, and the operation that made it."""
        self._made = {at: made for at, made in self._made.items() if made[0]() is not None}
        found = ((ref(), what) for ref, what in self._made.values())
        return [(storage.nbytes(), what) for storage, what in found if storage is not None]
