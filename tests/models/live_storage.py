"""What lives of the tensors that a computation makes, to the byte: their storages are watched, whoever holds them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorage(TorchDispatchMode):
    """Within it, every storage that an operation makes is noted; `nbytes` are those that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[weakref.ref[Any], str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in given and all(ref() is not storage for ref, _ in self._made):
                    self._made.append((weakref.ref(storage), f"{func} {tuple(x.shape)}"))
        return out

    @property
    def nbytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.table)

    @property
    def table(self) -> list[tuple[int, str]]:
        found = ((ref(), what) for ref, what in self._made)
        return [(storage.nbytes(), what) for storage, what in found if storage is not None]
