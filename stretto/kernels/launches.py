"""Launches of a Triton kernel that are looked up in place of being worked out again.

Triton reads at each launch what of the arguments its compiler has specialized on, in Python: 50 microseconds, where the
launch itself takes ten. A launch like an earlier one goes to the same binary: with other tensors, and with other
numbers of which Triton knows no more, as the rows that come to an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import Tensor

_ALIGNED: Final = 16
"""What Triton asks whether an address, in bytes, or a number is a multiple of."""
_INT32: Final = 2**31


class Launches:
    """A kernel, called as Triton's: `kernel[(programs,)](*arguments, num_warps=)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._constant = tuple(getattr(param, "is_constexpr", True) for param in getattr(kernel, "params", ()))
        self._known: dict[Any, Any] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        """The kernel in so many programs."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int], *given: Any, num_warps: int) -> None:
        known = self._known.get(key := (given[0].device, num_warps, *map(_kind, given, self._constant)))
        if known is not None:
            known[(*grid, 1, 1)](*given)
            return
        compiled = self.kernel[grid](*given, num_warps=num_warps)
        if compiled is not None:  # an interpreter compiles nothing
            self._known[key] = compiled


def _kind(given: Any, constant: bool) -> Any:
    """What Triton specializes on."""
    if isinstance(given, Tensor):
        return given.dtype, given.data_ptr() % _ALIGNED == 0
    if constant or type(given) is not int:
        return given
    return given if given == 1 else (given % _ALIGNED == 0, -_INT32 <= given < _INT32)
