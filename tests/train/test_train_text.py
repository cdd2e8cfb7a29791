"""Text as batches, where few tokens count: of conversations the answers alone do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stretto
from stretto.arguments.schema import BatchConfig
from stretto.data.lost import Lost
from stretto.data.store import TokenStore, write_store
from stretto.data.text import EvalSet
from stretto.train.text import HeldOut

pytestmark = pytest.mark.gloo


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_in_which_nothing_counts_weighs_nothing_in_an_evaluation(tmp_path: Path, packing: bool) -> None:
    """Catches: a held-out loss that is a mean with a 0 for each batch without an answer."""
    with write_store(tmp_path / "store", vocab_size=9, eod=0, fingerprint="", masked=True) as writer:
        writer.add(np.full(13, ~5), 0)  # a long prompt,
        writer.add(np.array([~5, ~5, 7]), 0)  # and a pair whose answer is one token
    held = EvalSet("held", TokenStore.open(tmp_path / "store"), Lost(), None)
    batch = BatchConfig(seq_len=4, micro_batch=1, global_batch=1)
    with stretto.initialize() as world, stretto.ParallelState.build(stretto.Layout.of(), world) as state:
        found = list(HeldOut(held, batch, state, limit=0, packing=packing).batches())
    assert sorted(float(weight) for _, weight in found) == [0.0] * (len(found) - 1) + [1.0]
    assert all(microbatch.count == 1 for microbatches, _ in found for microbatch in microbatches)  # divides by no 0
