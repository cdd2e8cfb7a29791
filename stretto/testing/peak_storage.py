"""The most that lives at once of the tensors that a computation makes, to the byte, on a CPU as on a GPU.

On a GPU a chain of elementwise operations is one kernel, which makes its outputs and nothing else; some
hand-written kernels put them where their inputs were. Here the same functions are many operations on a CPU.
`PeakStorage` counts at the borders of such functions only, and `as_on_a_gpu` has them leave their outputs where the
kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from stretto.attention import tile
from stretto.experts import fp8 as experts_fp8
from stretto.experts import grouped, scores
from stretto.tensor_parallel import formulas, fp8, linear, sliced_gemms
from stretto.testing.live_storage import LiveStorage

Function = Callable[..., Any]


class PeakStorage(LiveStorage):  # type: ignore[no-untyped-call]  # of its __init_subclass__
    """Within it, every storage that an operation makes is noted; `peak` are the most bytes that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self._hidden = 0
        self._watched: dict[int, Any] = {}
        self.peak = 0
        self.at_peak: list[tuple[int, str]] = []
        """Bytes of each that was there then, and the operation that made it."""

    def note(self, out: Any, given: Any, what: str) -> None:
        """As it has it, unless a function that counts as one operation is at work."""
        if self._hidden:
            return
        super().note(out, given, what)
        found = self.table
        now = sum(size for size, _ in found) + sum(storage.nbytes() for storage in self._watched.values())
        if now > self.peak:
            self.peak, self.at_peak = now, sorted(found, reverse=True)

    def watch(self, *tensors: Tensor) -> None:
        """Count these, too: their memory may come and go without an operation."""
        self._watched |= {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}

    def whole(self, function: Function) -> Function:
        """`function` as one operation: of what it makes, what it returns is seen alone."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._hidden += 1
            try:
                out = function(*args, **kwargs)
            finally:
                self._hidden -= 1
            self.note(out, (args, kwargs), getattr(function, "__name__", "kernel"))
            return out

        return call


@contextmanager
def as_on_a_gpu(mode: PeakStorage) -> Iterator[Function]:
    """What is given fuses a function as a GPU's build does; GEMMs add to gradients in fp32 without a copy."""

    def fuse(function: Function) -> Function:
        of = function.func if isinstance(function, partial) else function
        return mode.whole(_IN_PLACE[of](function) if of in _IN_PLACE else function)

    adding = mode.whole(linear.accumulate_matmul)
    with (
        patch.object(linear, "accumulate_matmul", adding),
        patch.object(grouped, "accumulate_matmul", adding),
        patch.object(scores, "accumulate_matmul", adding),
        patch.object(sliced_gemms, "accumulate_matmul", adding),
        patch.object(fp8, "accumulate_matmul", adding),
        patch.object(fp8, "_matmul", mode.whole(fp8._matmul)),
        patch.object(experts_fp8, "_products", mode.whole(experts_fp8._products)),
        patch.object(scores, "plainly", partial(_by_parts, scores.plainly)),
        patch.object(scores._Scores, "forward", mode.whole(scores._Scores.forward)),
        patch.object(tile.Exact, "forward", mode.whole(_in_dtype(tile.Exact.forward, 1))),
        patch.object(tile.Exact, "backward", mode.whole(_in_dtype(tile.Exact.backward, 3))),
    ):
        yield fuse


def _by_parts(otherwise: Function, dy: Tensor, x: Tensor, weight: Tensor) -> Any:
    """As scores are computed of bf16 factors on a GPU."""
    if x.dtype != torch.bfloat16:
        return otherwise(dy, x, weight)
    return scores.by_parts(dy, x, weight, scores.three_parts)


def _in_dtype(function: Function, number: int) -> Function:
    """Attention of a tile gives so many tensors in the dtype of what it is given, as the kernels of a GPU do."""

    def call(self: Any, first: Tensor, *rest: Any) -> Any:
        out = function(self, first, *rest)
        return (*(x.to(first.dtype) for x in out[:number]), *out[number:])

    return call


def _into(given: tuple[int | None, ...]) -> Callable[[Function], Function]:
    """A kernel that writes its n-th output where the input of that number was."""

    def of(function: Function) -> Function:
        def call(*inputs: Tensor, **named: Any) -> Any:
            out = function(*inputs, **named)
            return tuple(x if at is None else inputs[at].view_as(x).copy_(x) for at, x in zip(given, out, strict=True))

        return call

    return of


_IN_PLACE = {
    formulas.swiglu_backward: _into((1,)),
    formulas.swiglu_both: _into((0, 1)),
    formulas.swiglu_weighted: _into((0, 1, None)),
}
