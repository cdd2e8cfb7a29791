"""Texts and tensors between ranks arrive as they were sent, in the order of the ranks.

Faults to catch: a shorter text that keeps the padding of a longer one; a dtype that changes on the way; ranks out of
order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stretto.exchange import all_gather_bytes, all_gather_json, all_gather_tensors, all_same, broadcast_json
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

DTYPES = (torch.float64, torch.bfloat16, torch.int64, torch.uint8)


def _exchanged(world: World) -> tuple[list[bytes], list[Any], list[dict[str, Tensor]]]:
    rank = world.rank
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        axis = state.axis("dp")
        texts = all_gather_bytes(b"x" * (2 - rank) * 100, axis.size, axis.group)
        values = all_gather_json([rank, None, {"of": "\u00e9" * rank}], axis)
        named = {f"{rank}.{dtype}": torch.arange(6).to(dtype).view(2, 3).t() + rank for dtype in DTYPES[: rank + 2]}
        return texts, values, all_gather_tensors(named, axis)


def test_each_rank_gets_what_each_rank_gave(pool: Pool) -> None:
    for texts, values, tensors in pool.run(3, _exchanged):
        assert texts == [b"x" * 200, b"x" * 100, b""]
        assert values == [[rank, None, {"of": "\u00e9" * rank}] for rank in range(3)]
        for rank, named in enumerate(tensors):
            assert set(named) == {f"{rank}.{dtype}" for dtype in DTYPES[: rank + 2]}
            for dtype in DTYPES[: rank + 2]:
                expected = torch.arange(6).to(dtype).view(2, 3).t() + rank
                assert named[f"{rank}.{dtype}"].dtype == dtype
                assert torch.equal(named[f"{rank}.{dtype}"], expected)


def test_one_rank_needs_no_group() -> None:
    axis = Axis.single("dp")
    assert all_gather_json({"a": [1]}, axis) == [{"a": [1]}]
    assert torch.equal(all_gather_tensors({"x": torch.ones(2)}, axis)[0]["x"], torch.ones(2))


def _same(world: World, values: list[bytes]) -> bool:
    return all_same(values[world.rank], world.size, None)


@pytest.mark.parametrize(("values", "same"), [([b"a"] * 3, True), ([b"a", b"a", b"b"], False), ([b""] * 3, True)])
def test_all_ranks_know_whether_all_have_the_same(pool: Pool, values: list[bytes], same: bool) -> None:
    """Catches: a rank that compares itself with one other only."""
    assert pool.run(3, _same, values) == [same] * 3


def _told(world: World) -> object:
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        return broadcast_json({"of": "\u00e9" * 50, "rank": 0} if world.rank == 0 else None, state.axis("dp"))


def test_what_the_first_rank_says_arrives_on_all(pool: Pool) -> None:
    assert pool.run(2, _told) == [{"of": "\u00e9" * 50, "rank": 0}] * 2
    assert broadcast_json([1], Axis.single("dp")) == [1]
