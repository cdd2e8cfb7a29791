"""What a rank has of whole rows: tokens with their own labels, masks, places and positions.

Faults to catch: a rank that takes another's slots; a slot beyond the row that counts; a structure that forgets where
its documents begin when it goes to a device; numbers of documents that are taken for where they begin;
layers of two windows that are even only together.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.needed_keys import lengths_of
from stretto.batch import Batch
from stretto.sequence import pairs, tiles
from stretto.sequence.deal import uneven
from stretto.structure import SequenceCut, Structure

pytestmark = pytest.mark.gloo


def batch_of(rows: int, length: int, *, packed: bool) -> Batch:
    """Token t of a row is t, what comes next t + 1."""
    tokens = torch.arange(length).expand(rows, -1).contiguous()
    starts = None
    if packed:
        starts = torch.stack([tokens[n] // (n + 3) * (n + 3) for n in range(rows)])
    return Batch(tokens, tokens + 1, tokens % 3 > 0, torch.arange(rows), starts)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(4, 30), st.sampled_from([1, 2]), st.booleans())
def test_ranks_together_have_each_token_once(cp: int, rows: int, length: int, multiple: int, packed: bool) -> None:
    whole = batch_of(rows, length, packed=packed)
    seen, counts = torch.zeros(rows, length, dtype=torch.int64), 0
    for rank in range(cp):
        batch, structure = SequenceCut(rank, cp, multiple).of(whole)
        counts += int(batch.loss_mask.sum())
        if structure.plain:
            assert batch is whole
            seen += 1
            continue
        assert batch.tokens.shape == (rows, structure.slots)
        assert structure.slots % multiple == 0
        assert structure.places is not None
        assert structure.positions is not None
        places, positions = (x.t().expand(rows, -1) for x in (structure.places, structure.positions))
        here = places < length
        assert torch.equal(batch.tokens[here], places[here])
        assert torch.equal(batch.labels[here], places[here] + 1), "labels were shifted before the cut"
        assert torch.equal(batch.loss_mask, (places % 3 > 0) & here)
        starts = torch.zeros(rows, length, dtype=torch.int64) if whole.starts is None else whole.starts
        assert torch.equal(positions[here], (places - starts.gather(1, places.clamp(max=length - 1)))[here])
        for row in range(rows):
            seen[row, places[row][here[row]]] += 1
    assert (seen == 1).all()
    assert counts == int(whole.loss_mask.sum())


def test_a_plain_row_is_left_as_it_is() -> None:
    whole = batch_of(2, 7, packed=False)
    batch, structure = SequenceCut().of(whole)
    assert batch is whole
    assert structure.plain
    assert structure.places_of(1, 3, torch.device("cpu")).tolist() == [3, 4, 5]
    assert Structure.of_tokens(2, first=5).positions_of(0, 2, torch.device("cpu")).tolist() == [5, 6]


def test_a_structure_is_the_same_on_another_device() -> None:
    _, structure = SequenceCut(1, 2).of(batch_of(2, 9, packed=True))
    moved = structure.to("cpu")
    assert not moved.plain
    assert moved.tiles((0, 1), (0, 1), None) == structure.tiles((0, 1), (0, 1), None)
    assert torch.equal(moved.order((0, 1), torch.device("cpu")), structure.order((0, 1), torch.device("cpu")))
    shapes = r"starts must be \[b, s\] = \[2, 9\]"
    with pytest.raises(ValueError, match=shapes):
        Batch(*[torch.zeros(2, 9, dtype=torch.int64)] * 2, torch.ones(2, 9, dtype=torch.bool), starts=torch.zeros(2, 8))


@pytest.mark.parametrize("starts", [[0, 0, 1, 1], [0, 0, -1, -1], [0, 1, 0, 0], [0, 0, 3, 3], [1, 1, 1, 1]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_starts_that_are_none_are_rejected(starts: list[int], ranks: int) -> None:
    """Catches numbers of documents in place of where they begin: another model was trained, without a word."""
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    batch = Batch(tokens, tokens, tokens.bool(), starts=torch.tensor([[0, 0, 2, 3], starts]))
    with pytest.raises(ValueError, match=r"starts of row 1 has -?\d at place \d: must be \d, .* or \d, as the token"):
        SequenceCut(0, ranks).of(batch)


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("window", [128, 4096])
def test_layers_with_and_without_a_window_are_each_even(cp: int, window: int) -> None:
    """Every layer waits for the heaviest rank. The sum of both kinds was even, each had up to 1.2 times the mean."""
    rng = random.Random(cp)
    rows = [torch.tensor(lengths_of(16384, parts, 1.5, rng)) for parts in (16, 64)]
    starts = torch.stack([(each.cumsum(0) - each).repeat_interleave(each) for each in rows])
    tokens = torch.zeros_like(starts)
    batch = Batch(tokens, tokens, tokens.bool(), starts=starts)
    held = SequenceCut(0, cp, windows=(window, None, window)).of(batch)[1].held
    for each in (window, None):
        counted = [
            sum(pairs(t) for row in held for keys in row.runs for t in tiles(row.runs[rank], keys, each))
            for rank in range(cp)
        ]
        assert uneven(np.array(counted)) <= 1.02, each
