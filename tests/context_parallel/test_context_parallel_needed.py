"""Only the keys that some query sees go to other ranks, and only their gradients come back.

Faults to catch: keys of other documents that are sent; a window that the plan does not know; a gradient that only the
last rank that needs a key adds; rows of a microbatch whose keys change places.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from context_parallel_ranks import as_threads, axes
from hypothesis import given
from hypothesis import strategies as st
from test_context_parallel_attention import batch_of, cut_at_random, over_ranks
from test_context_parallel_layouts import arguments, layout_of
from torch import Tensor

from benchmarks.needed_keys import needed as counted_by_tiles
from stretto.arguments.schema import Arguments, ParallelConfig
from stretto.attention import Scores, causal_attention
from stretto.attention.tile import Exact
from stretto.collective_trace import CollectiveCall
from stretto.context_parallel import ContextAttention, Way
from stretto.sequence import crossing, needed
from stretto.structure import SequenceCut, Structure
from stretto.testing import Pool
from stretto.verify.comms import communication, record_step
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

HEADS, DIM = 2, 4
WAYS: list[Way] = ["needed", "needed", "all-gather"]


def structures_of(starts: Tensor | None, rows: int, length: int, cp: int, window: int | None) -> list[Structure]:
    batch = batch_of(starts, rows, length)
    return [SequenceCut(rank, cp, 1, (window,)).of(batch)[1] for rank in range(cp)]


def told_by(structures: list[Structure], rows: int, window: int | None) -> dict[tuple[int, str], list[int]]:
    """What each rank sends by each operation in a forward and a backward: rows of keys and values of all heads."""
    cp, told = len(structures), defaultdict[tuple[int, str], list[int]](list)

    def run(rank: int) -> None:
        near, far = axes(rank, cp, 1)

        def note(axis: Axis, op: str, x: Tensor, ends: tuple[int, int] | None = None) -> None:
            assert x.shape[1:] == (2 * HEADS, DIM)
            told[rank, op].append(len(x))

        far = replace(far, observer=note)
        shape = rows, HEADS, structures[rank].slots, DIM
        q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
        attend = ContextAttention(causal_attention, Exact(), near, far, "needed")
        attend(q, k, v, Scores(window=window), structures[rank]).sum().backward()

    with as_threads() as ranks:
        ranks(cp, run)
    return dict(told)


@given(
    seed=st.integers(0, 2**31),
    cp=st.sampled_from([2, 3, 4]),
    rows=st.sampled_from([1, 2]),
    window=st.sampled_from([None, 1, 3, 40]),
    packed=st.booleans(),
)
def test_what_is_sent_is_what_queries_see(seed: int, cp: int, rows: int, window: int | None, packed: bool) -> None:
    """As the benchmark counts it by tiles; forward, once more in the backward, and as many gradients back."""
    rng = random.Random(seed)
    length = rng.randint(cp, 40)
    starts = cut_at_random(rows, length, rng) if packed else None
    structures = structures_of(starts, rows, length, cp, window)
    sent, came = [0] * cp, [0] * cp
    for held in structures[0].held:
        pairs, alike = crossing(needed(held.runs, window)), held.rows.stop - held.rows.start
        shares = counted_by_tiles(held.runs, window)
        for rank, share in enumerate(shares):
            others = sum(run.length for other, runs in enumerate(held.runs) if other != rank for run in runs)
            assert round(share * others) == pairs[:, rank].sum()
            sent[rank] += alike * int(pairs[rank].sum())
            came[rank] += alike * int(pairs[:, rank].sum())
    told = told_by(structures, rows, window)
    assert told == {(rank, "all_to_all_rows"): [sent[rank], sent[rank], came[rank]] for rank in range(cp)}


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_the_same_bits_each_time_and_nearly_those_of_an_all_gather(packed: bool) -> None:
    """In fp32 they are added up in another order: one rank's after the other's."""
    length, generator = 61, torch.Generator().manual_seed(4)
    starts = cut_at_random(2, length, random.Random(1)) if packed else None
    structures = structures_of(starts, 2, length, 4, None)
    inputs = [torch.randn(2, h, length, 8, generator=generator) for h in (4, 2, 2, 4)]
    once, again, other = (over_ranks(inputs, structures, way, 1, Scores()) for way in WAYS)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for a, b in zip(once, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_documents_that_lie_on_one_rank_send_nothing() -> None:
    starts = torch.arange(12).reshape(1, -1)  # of one token each
    told = told_by(structures_of(starts, 1, 12, 3, None), 1, None)
    assert set(map(tuple, told.values())) == {(0, 0, 0)}


def _record(world: World, args: Arguments) -> dict[int, list[CollectiveCall]]:
    return record_step(args, layout_of(args), world)


@pytest.mark.parametrize("recompute", ["none", pytest.param("block", marks=pytest.mark.nightly)])
def test_a_step_sends_what_the_textbook_says(pool: Pool, recompute: str) -> None:
    """Of a row of one document: all that comes before, and of some layers a window."""
    parallel = ParallelConfig(cp=3, dp=1, cp_comm=("needed",))
    args = arguments(parallel, recompute=recompute, window=2, global_layers=(1,))
    found = communication(args, layout_of(args), pool.run(3, _record, args)[0])
    assert found.right, [(s.axis, s.op, s.measured.bytes, s.textbook) for s in found.sent if s.off]
    assert any(sent.op == "all_to_all_rows" for sent in found.sent)
