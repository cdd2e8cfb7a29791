"""Launches that are looked up: a launch goes to the binary that Triton would choose, with its own tensors.

Faults to catch: a binary for multiples of sixteen that is given others; a constant of an earlier launch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stretto.kernels.launches import Launches

pytestmark = pytest.mark.gloo


class Kernel:
    """As Triton's: what is launched for the first time is compiled, and the result launched by its grid."""

    params = tuple(SimpleNamespace(is_constexpr=constant) for constant in (False, False, True))

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.looked_up: list[Any] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
        def launch(*given: Any, num_warps: int) -> Any:
            self.compiled.append((grid, given, num_warps))
            return self.Binary(self, num_warps)

        return launch

    class Binary:
        function, packed_metadata = "function", "metadata"

        def __init__(self, of: Kernel, num_warps: int) -> None:
            self.of, self.num_warps = of, num_warps

        def run(self, *rest: Any) -> None:
            x, y, z, _stream, *told = rest
            assert told[:5] == [self.function, self.packed_metadata, None, None, None]
            self.of.looked_up.append(((x, y, z), tuple(told[5:]), self.num_warps))


def test_a_launch_like_an_earlier_one_is_looked_up() -> None:
    """With its own tensors, grid and number. Catches: those of the first launch in the second."""
    kernel = Kernel()
    launches = Launches(kernel)
    x, y = torch.zeros(8), torch.zeros(8)
    launches[(3,)](x, 5, 64, num_warps=4)
    launches[(4,)](y, 7, 64, num_warps=4)
    assert len(kernel.compiled) == 1
    [(grid, (given, seven, _), warps)] = kernel.looked_up
    assert (grid, given is y, seven, warps) == ((4, 1, 1), True, 7, 4)


def test_a_launch_of_another_kind_is_compiled() -> None:
    """Catches: a binary for aligned addresses that gets others, for another dtype, for multiples of 16, for a number
    that is 1 or has 32 bits, for another constant, other warps."""
    kernel = Kernel()
    launches = Launches(kernel)
    x = torch.zeros(8)
    others = [(x[1:], 5, 64), (x.double(), 5, 64), (x, 16, 64), (x, 1, 64), (x, 2**31 + 5, 64), (x, 5, 128)]
    for given in [(x, 5, 64), *others]:
        launches[(3,)](*given, num_warps=4)
    launches[(3,)](x, 5, 64, num_warps=8)
    assert (len(kernel.compiled), kernel.looked_up) == (len(others) + 2, [])
    for given in [(x[1:], 9, 64), (x, 32, 64), (x, 2**31 + 7, 64)]:
        launches[(3,)](*given, num_warps=4)
    assert (len(kernel.compiled), len(kernel.looked_up)) == (len(others) + 2, 3)
