"""A group has a window only where every rank reaches every other, and all its ranks say so."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.distributed import HashStore

from stretto.parallel_state import reach
from stretto.parallel_state.plan import GroupOptions, PlannedGroup
from stretto.world import World

pytestmark = pytest.mark.gloo

TWO = PlannedGroup((("tp",),), (0, 1), GroupOptions(peer_buffer=1))
ME = replace(World.single(), size=2, device=torch.device("cuda", 0))


@pytest.mark.parametrize("peer", ["here", "elsewhere"])
@pytest.mark.parametrize("accessible", [True, False])
@pytest.mark.parametrize("theirs", ["True", "False"])
def test_a_window_is_between_gpus_of_one_host_that_reach_each_other(peer: str, accessible: bool, theirs: str) -> None:
    store = HashStore()
    store.set(f"{TWO}/host/1", f"1 {reach._host() if peer == 'here' else 'elsewhere'}")
    store.set(f"{TWO}/reach/1", theirs)
    with (
        mock.patch.object(torch.cuda, "can_device_access_peer", return_value=accessible),
        mock.patch.object(torch.cuda, "device_count", return_value=2),
    ):
        assert reach._within_reach(ME, TWO, store) == (peer == "here" and accessible and theirs == "True")


def test_a_group_without_a_window_is_not_asked_about() -> None:
    assert reach.open_reach(ME, {replace(TWO, options=GroupOptions()): mock.Mock()}, HashStore()) == {}
