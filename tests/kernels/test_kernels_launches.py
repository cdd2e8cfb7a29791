"""Launches that are looked up: a launch goes to the binary that Triton would choose, with its own tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stretto.kernels.launches import Launches

pytestmark = pytest.mark.gloo


class Kernel:
    """As Triton's: what is launched for the first time is compiled, and the result launched by its grid."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.looked_up: list[Any] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
        def launch(*given: Any, num_warps: int) -> Any:
            self.compiled.append((grid, given, num_warps))
            return self.Binary(self, num_warps)

        return launch

    class Binary:
        def __init__(self, of: Kernel, num_warps: int) -> None:
            self.of, self.num_warps = of, num_warps

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *given: self.of.looked_up.append((grid, given, self.num_warps))


def test_a_launch_like_an_earlier_one_is_looked_up() -> None:
    """Catches: tensors of the first launch in the second; a binary for aligned addresses that gets others, for another
    dtype, another number, another grid, other warps."""
    kernel = Kernel()
    launches = Launches(kernel)
    x, y = torch.zeros(8), torch.zeros(8)
    launches[(3,)](x, 5, num_warps=4)
    launches[(3,)](y, 5, num_warps=4)
    assert len(kernel.compiled) == 1
    [(grid, (given, five), warps)] = kernel.looked_up
    assert (grid, given is y, five, warps) == ((3, 1, 1), True, 5, 4)
    launches[(3,)](y[1:], 5, num_warps=4)
    launches[(3,)](y.double(), 5, num_warps=4)
    launches[(3,)](y, 6, num_warps=4)
    launches[(4,)](y, 5, num_warps=4)
    launches[(3,)](y, 5, num_warps=8)
    assert (len(kernel.compiled), len(kernel.looked_up)) == (6, 1)
    launches[(3,)](x[1:], 5, num_warps=4)
    assert len(kernel.looked_up) == 2
