"""Parts of a sum are added in the order of the ranks, none before it is used up."""

from __future__ import annotations

import pytest
import torch

from stretto.peer_memory import _all_but_last

pytestmark = pytest.mark.gloo


@pytest.mark.parametrize(("size", "rank"), [(size, rank) for size in range(2, 6) for rank in range(size)])
def test_every_part_counts_once_on_every_rank(size: int, rank: int) -> None:
    """Catches a partial sum that is written over a part still to come: from three ranks on there are such."""
    given = [torch.randn(7, generator=torch.Generator().manual_seed(n)) for n in range(size)]
    parts = [x.clone() for x in given]
    first, last = _all_but_last(parts, parts[rank])
    want = given[0]
    for each in given[1:]:
        want = want + each
    assert torch.equal(first + last, want)
    assert torch.equal(parts[rank], given[rank])
