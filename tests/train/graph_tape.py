"""What a CUDA graph does, on a CPU: operations of torch on the very tensors that they were recorded with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FAILED = "operation failed due to a previous error during capture"


class Tape(TorchDispatchMode):
    """A `Recorder`. A replay does not repeat what Python computes, and what is recorded leaves no trace, as on a GPU.

    Reading a tensor on the host is an error while it records. `fails` recordings end with an error, the last of
    them when all is launched, the one before it half-way, and so on.
    """

    def __init__(self, fails: int = 0) -> None:
        super().__init__()
        self.fails, self.replays = fails, 0
        self._tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._made: set[int] = set()
        self._arriving: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        self._tape, self._made, self._arriving, self._before = [], set(), set(), {}
        self.fails -= 1
        try:
            with self:
                body()
            if self.fails >= 0 and self.fails % 2 == 0:
                raise RuntimeError(FAILED)
        finally:
            for whole, values in self._before.values():
                whole.copy_(values)
        tape = self._tape

        @torch.no_grad()
        def replay() -> None:
            self.replays += 1
            for op, args, named, outputs in tape:
                new = op(*args, **named)
                if op.namespace == "c10d":
                    tree_leaves(new)[-1].wait()  # a stream would
                if outputs is not None:
                    for old, value in zip(tree_leaves(outputs), tree_leaves(new), strict=True):
                        if isinstance(old, Tensor):
                            old.copy_(value)

        return replay

    def clear(self) -> None:
        """Nothing is kept here."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.fails >= 0 and self.fails % 2 and len(self._tape) == 60:
            raise RuntimeError(FAILED)
        written = [
            named.get(a.name, args[n] if n < len(args) else None)
            for n, a in enumerate(op._schema.arguments)
            if op.namespace == "c10d" or (a.alias_info is not None and a.alias_info.is_write)
        ]
        for x in tree_leaves(written):
            if isinstance(x, Tensor) and (key := x.untyped_storage().data_ptr()) not in self._made | {*self._before}:
                whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                self._before[key] = whole, whole.clone()
        made = op(*args, **named)
        if op.namespace == "c10d" and isinstance(args[0], Tensor):
            self._arriving.add(args[0].data_ptr())
        if op is torch.ops.aten.copy_.default and args[0].data_ptr() in self._arriving:
            return made  # by the wait for a sum of Gloo, which a replay waits for as well
        if written:
            self._tape.append((op, args, named, None))
        elif all(r.alias_info is None for r in op._schema.returns):
            self._made |= {x.untyped_storage().data_ptr() for x in tree_leaves(made) if isinstance(x, Tensor)}
            if "empty" not in op._schema.name:
                self._tape.append((op, args, named, made))
        return made
