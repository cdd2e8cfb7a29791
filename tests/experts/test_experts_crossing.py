"""A token crosses once to each other rank that holds any of its experts.

Faults to catch: tokens that go to ranks without any of their experts; a place that counts other ranks' tokens; tokens
that a rank sends to itself.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stretto.experts.crossing import Crossing
from stretto.world import Axis, ExpertAxes

pytestmark = pytest.mark.gloo


@given(st.data(), st.integers(0, 9), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_each_goes_to_its_holders_once(data: st.DataObject, n: int, k: int, ep: int, etp: int, ep_first: bool) -> None:
    drawn = data.draw(st.lists(st.integers(0, ep), min_size=n * k, max_size=n * k))  # ep: dropped
    holders = torch.tensor(drawn, dtype=torch.int64).view(n, k)
    places = [(e, t) for e in range(ep) for t in range(etp)] if ep_first else [
        (e, t) for t in range(etp) for e in range(ep)
    ]  # fmt: skip
    ranks = len(places)
    me = data.draw(st.integers(0, ranks - 1))
    one, other = (Axis(name, 0, tuple(range(size))) for name, size in (("ep", ep), ("etp", etp)))
    found = Crossing.of(holders, ExpertAxes(one, other, Axis("etp-ep", me, tuple(range(ranks))), tuple(places)))
    assert len(found.tokens) == n * min(k * etp, ranks - 1)
    begin = 0
    for rank, (e, _) in enumerate(places):
        going = [] if rank == me else [token for token in range(n) if e in holders[token]]
        assert found.number[rank] == len(going)
        assert found.tokens[begin : begin + len(going)].tolist() == going
        for token in range(n):
            for slot in range(k):
                if rank != me and holders[token, slot] == e:
                    assert found.place[token * k + slot] == going.index(token)
        begin += len(going)
    assert not found.tokens[begin:].any()
