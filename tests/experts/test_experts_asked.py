"""Ranks tell each other their sizes without a wait of the host: it waits once, for what they told.

Faults to catch: places that are looked up by a list of the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from stretto.experts.axes import expert_axes
from stretto.experts.plan import Sorting
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

EXPERTS = 8


class HostLists(TorchFunctionMode):
    """Counts indices that torch makes a tensor of on the host: it waits until a GPU has a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += any(isinstance(each, list) for each in index)
        return func(*args, **(kwargs or {}))


def _asked(world: World, etp: int) -> tuple[int, int]:
    with ParallelState.build(Layout.of(tp=etp, dp=world.size // etp, ep=world.size // etp, etp=etp), world) as state:
        chosen = torch.randint(EXPERTS, (16, 2), generator=torch.Generator().manual_seed(world.rank))
        sorting = Sorting(chosen, EXPERTS, expert_axes(state))
        with HostLists() as lists:
            sorting.ask()
        return lists.found, sorting.plan().exchange.size


@pytest.mark.parametrize("etp", [1, 2])
def test_no_list_of_the_host_is_an_index(pool: Pool, etp: int) -> None:
    assert pool.run(4, _asked, etp) == [(0, 4)] * 4
