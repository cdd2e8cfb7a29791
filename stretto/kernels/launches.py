"""Launches of a Triton kernel that are looked up in place of being worked out again.

Triton reads at each launch what of the arguments its compiler has specialized on, in Python: 50 microseconds, where the
launch itself takes ten. A launch like an earlier one, with other tensors, goes to the same binary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import Tensor

_LIKE: Final = 512
"""Launches that are remembered; those of sizes that come after are Triton's own."""
_ALIGNED: Final = 16
"""Bytes: what Triton asks of an address."""


class Launches:
    """A kernel, called as Triton's: `kernel[(programs,)](*arguments, num_warps=)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._known: dict[Any, Callable[..., Any]] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        """The kernel in so many programs."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int], *given: Any, num_warps: int) -> None:
        at = given[0].device, grid, num_warps
        key = *at, *[(x.dtype, x.data_ptr() % _ALIGNED == 0) if isinstance(x, Tensor) else x for x in given]
        known = self._known.get(key)
        if known is not None:
            known(*given)
            return
        compiled = self.kernel[grid](*given, num_warps=num_warps)
        if compiled is not None and len(self._known) < _LIKE:  # an interpreter compiles nothing
            self._known[key] = compiled[(*grid, 1, 1)]
