"""Launches of a Triton kernel that are looked up in place of being worked out again.

Triton reads at each launch what of the arguments its compiler has specialized on, in Python, and makes a description of
the launch for its hooks: 50 microseconds, where the launch itself takes ten. A launch like an earlier one goes to the
same binary: with other tensors, and with other numbers of which Triton knows no more, as the rows that come to an
expert. Hooks of Triton's own profiler hear of the first of them alone; torch's profiler needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

_ALIGNED: Final = 16
"""What Triton asks whether an address, in bytes, or a number is a multiple of."""
_INT32: Final = 2**31
_STREAM: Final[Callable[[int], int]] = getattr(torch._C, "_cuda_getCurrentRawStream", int)
"""The current stream of a device; a torch without GPUs has none."""


def cdiv(x: int, y: int) -> int:
    """x / y rounded up. Triton's own, which its compiler takes too, costs the host a microsecond or three a call."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, of n > 0."""
    return 1 << (n - 1).bit_length()


class _Binary(NamedTuple):
    """What Triton's compiler made, and how it is launched."""

    launch: Callable[..., object]
    function: Any
    metadata: Any


class Launches:
    """A kernel, called as Triton's: `kernel[(programs,)](*arguments, num_warps=)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._constant = tuple(getattr(param, "is_constexpr", True) for param in getattr(kernel, "params", ()))
        self._known: dict[tuple[Any, ...], _Binary] = {}
        self._processors: dict[torch.device, int] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """The kernel in so many programs."""
        return partial(self._launch, grid)

    def processors(self, device: torch.device) -> int:
        """Multiprocessors of a GPU, asked for once: it takes longer than a launch. 1 where an interpreter computes."""
        found = self._processors.get(device)
        if found is None:
            gpu = device.type == "cuda"
            found = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 1
            self._processors[device] = found
        return found

    def _launch(self, grid: tuple[int, ...], *given: Any, num_warps: int) -> None:
        index = given[0].get_device()
        kind: list[Any] = [index, num_warps]  # what Triton specializes on; a loop costs the host least
        for x, constant in zip(given, self._constant, strict=False):
            if isinstance(x, Tensor):
                kind += (x.dtype, x.data_ptr() % _ALIGNED == 0)
            elif constant or type(x) is not int or x == 1:
                kind.append(x)
            else:
                kind.append((x % _ALIGNED == 0, -_INT32 <= x < _INT32))
        known = self._known.get(key := tuple(kind))
        if known is not None:
            x, y, z = (*grid, 1, 1)[:3]
            launch, function, metadata = known
            launch(x, y, z, _STREAM(index), function, metadata, None, None, None, *given)
            return
        compiled = self.kernel[grid](*given, num_warps=num_warps)
        if compiled is not None:  # an interpreter compiles nothing
            self._known[key] = _Binary(compiled.run, compiled.function, compiled.packed_metadata)
