"""Gradients that the other ranks read where they are: two regions, which buckets have in turns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stretto.distributed.region import Region, take_turns
from stretto.world import Axis

pytestmark = pytest.mark.gloo


class Peers:
    def __init__(self) -> None:
        self.settled = 0

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype)

    def settle(self, x: Tensor) -> None:
        self.settled += bool(x.numel())


class Bucket:
    """As one that still fills when it has to give way."""

    def __init__(self) -> None:
        self.grads = torch.zeros(0)

    def give_way(self) -> None:
        self.grads = self.grads.clone()


def test_who_had_to_give_way_comes_back_to_be_read() -> None:
    """Catches gradients sent from where the ranks do not agree, and those of one bucket sent as another's."""
    peers = Peers()
    region = Region(peers.empty(4, torch.float32), peers)  # type: ignore[arg-type]
    one, two = Bucket(), Bucket()
    one.grads = region.enter(one, 4).fill_(1)
    at = one.grads.data_ptr()
    two.grads = region.enter(two, 2).fill_(2)
    assert two.grads.data_ptr() == at
    assert one.grads.tolist() == [1, 1, 1, 1]
    one.grads = region.filled(one, one.grads)
    assert (one.grads.data_ptr(), two.grads.data_ptr() == at) == (at, False)
    assert one.grads.tolist() == [1, 1, 1, 1]
    assert two.grads.tolist() == [2, 2]
    assert peers.settled == 3
    assert region.filled(one, one.grads) is one.grads


def test_buckets_of_one_axis_take_turns() -> None:
    dp = Axis("dp", 0, (0, 1), peer_memory=Peers())  # type: ignore[arg-type]
    found = take_turns([(dp, 3, torch.float32), (dp, 5, torch.float32), (dp, 4, torch.float32)], 2)
    assert found[0] is found[2] is not found[1]
    assert found[0] is not None
    assert found[1] is not None
    assert [each.enter(Bucket(), 5).numel() for each in found[:2] if each] == [4, 5]
    assert take_turns([(Axis("ep", 0, (0, 1)), 3, torch.float32)], 2) == [None]
