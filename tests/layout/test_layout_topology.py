"""Where axes lie on nodes and racks, and orders that keep traffic close."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.layout import Layout, Topology, propose, reach, warnings

sys.path.insert(0, str(Path(__file__).parent))
from strategies import layouts

pytestmark = pytest.mark.pure


@given(layouts(), st.integers(1, 12), st.integers(1, 4))
def test_reach_is_the_worst_of_all_groups(layout: Layout, gpus: int, nodes: int) -> None:
    topology = Topology(gpus, nodes)
    for axis in ("tp", "cp", "dp", "pp", "ep", "edp"):
        by_node = [Counter(rank // gpus for rank in group) for group in layout.groups(axis)]
        by_rack = [{rank // (gpus * nodes) for rank in group} for group in layout.groups(axis)]
        found = reach(layout, topology, axis)
        assert found.nodes == max(map(len, by_node))
        assert found.racks == max(map(len, by_rack))
        assert found.company == min(min(shares.values()) for shares in by_node)


def test_tensor_parallel_across_nodes_is_warned_of() -> None:
    assert warnings(Layout.of(tp=8, dp=4), Topology(8)) == []
    (found,) = warnings(Layout.of(tp=16, dp=4, etp=8), Topology(8))
    assert "tp=16 spans 2 nodes of 8 GPUs" in found
    assert warnings(Layout.of(tp=4, dp=4, order="dp-tp"), Topology(8))  # small enough, but spread by the order
    assert "partly empty" in warnings(Layout.of(dp=12), Topology(8))[0]


def test_the_heaviest_axis_is_proposed_innermost() -> None:
    best = propose(Topology(8), tp=8, dp=4, pp=4)[0]
    assert best.order == "tp-cp-ep-dp-pp"
    assert reach(best.layout, Topology(8), "tp").inside
    # With all traffic on the pipeline, it is the pipeline that wants to be inside a node.
    best = propose(Topology(8), tp=8, dp=4, pp=4, traffic={"pp": 1.0})[0]
    assert reach(best.layout, Topology(8), "pp").inside


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2]))
def test_no_order_beats_the_proposed_one(tp: int, dp: int, pp: int, ep: int) -> None:
    if tp * dp % ep:
        ep = 1
    found = propose(Topology(4), tp=tp, dp=dp, pp=pp, ep=ep)
    assert found[0].cost == min(proposal.cost for proposal in found)
    assert len({proposal.order for proposal in found}) == len(found)


def test_a_million_ranks_have_a_reach() -> None:
    layout = Layout.of(tp=8, cp=4, dp=2048, pp=16, ep=64)
    topology = Topology(8, 9)
    assert reach(layout, topology, "tp").inside
    assert str(reach(layout, topology, "ep")) == "8 nodes, 2 racks"
    assert reach(layout, topology, "dp").nodes == 2048


def test_sizes_that_do_not_fit_any_order_are_explained() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        propose(Topology(8), dp=4, ep=3)
    with pytest.raises(ValueError, match="gpus_per_node=0"):
        Topology(0)
