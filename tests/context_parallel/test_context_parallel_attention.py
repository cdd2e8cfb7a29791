"""P1, P7. Attention over rows on several ranks against its definition over whole rows: outputs and gradients in fp64.

Faults to catch: a merge in bf16; a merge that forgets to rescale; gradients of keys that are not summed over ranks;
gradients that travel with the wrong block; keys along the diagonal that are seen twice; half of the diagonal without a
gradient; gradients of some heads that go home as those of others; a window counted from the tile; documents that see
one token of the one before; copies of key/value heads that keep their own gradients; ranks that exchange heads and all
have the first sinks.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from context_parallel_ranks import Room, as_threads, axes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stretto.attention import Scores, causal_attention
from stretto.attention.tile import Exact
from stretto.batch import Batch
from stretto.context_parallel import ContextAttention, Way
from stretto.structure import SequenceCut, Structure

pytestmark = pytest.mark.gloo

WAYS: list[tuple[Way, int]] = [("all-gather", 1), ("ring", 1), ("needed", 1), ("all-gather", 0), ("ring", 2)]
"""How keys travel, and how many neighbours exchange heads (0: all)."""


def definition(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scores: Scores, sinks: Tensor | None = None) -> Tensor:
    """[b, heads, s, d], written down once more, with a mask."""
    s, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    x = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    if scores.softcap is not None:
        x = scores.softcap * torch.tanh(x / scores.softcap)
    at = torch.arange(s)
    seen = (at <= at[:, None]) & (at >= starts[:, :, None])
    if scores.window is not None:
        seen = seen & (at > at[:, None] - scores.window)
    x = x.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        x = torch.cat([x, sinks[:, None, None].expand(*x.shape[:3], 1)], -1)
    return x.softmax(-1)[..., :s] @ v


def cut_at_random(rows: int, length: int, rng: random.Random) -> Tensor:
    """Starts [rows, length] of documents, some of them of one token."""
    begins = torch.tensor([[n == 0 or rng.random() < 0.25 for n in range(length)] for _ in range(rows)])
    return torch.where(begins, torch.arange(length), 0).cummax(1).values


def batch_of(starts: Tensor | None, rows: int, length: int) -> Batch:
    """Tokens that say where they stand."""
    tokens = torch.arange(length).expand(rows, -1).contiguous()
    return Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), starts=starts)


def over_ranks(
    inputs: list[Tensor],
    structures: list[Structure],
    way: Way,
    inner: int,
    scores: Scores,
    sinks: Tensor | None = None,
    room: Any = None,
) -> list[Tensor]:
    """Output and gradients of q, k and v [b, heads, s, d], put together from all ranks. `inputs`: q, k, v and dy.

    With sinks their gradient comes last: the sum of what the ranks have.
    """
    cp, length = len(structures), structures[0].length
    wide = [torch.cat([x, x.new_zeros(*x.shape[:2], cp * structures[0].slots - length, x.shape[3])], 2) for x in inputs]
    index = [s.places.t()[:, None, :, None] for s in structures if s.places is not None]  # [b or 1, 1, n, 1]

    def run(rank: int) -> list[Tensor]:
        near, far = axes(rank, cp, inner)
        attend = ContextAttention(causal_attention, Exact(), near, replace(far, peer_buffer=room), way)
        q, k, v, dy = (x.gather(2, index[rank].expand(*x.shape[:2], -1, x.shape[3])) for x in wide)
        own = [] if sinks is None else [sinks.clone().requires_grad_()]
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        y = attend(q, k, v, scores, structures[rank], *own)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v, *own), dy)]

    with as_threads() as ranks:
        found = ranks(cp, run)
    whole = []
    for parts, like in zip(zip(*(each[:4] for each in found), strict=True), [wide[0], *wide[:3]], strict=True):
        out = torch.zeros_like(like)
        for part, at in zip(parts, index, strict=True):
            out.scatter_(2, at.expand(*part.shape[:2], -1, part.shape[3]), part)
        whole.append(out[:, :, :length])
    return whole if sinks is None else [*whole, torch.stack([each[4] for each in found]).sum(0)]


@given(
    seed=st.integers(0, 2**31),
    cp=st.sampled_from([1, 2, 3, 4]),
    way=st.sampled_from(WAYS),
    kv_heads=st.sampled_from([1, 2, 12]),
    scores=st.sampled_from([Scores(), Scores(window=3), Scores(softcap=1.5), Scores(0.3, 2.0, 5)]),
    packed=st.booleans(),
    sunk=st.booleans(),
)
def test_every_way_over_any_documents_is_attention_by_its_definition(
    seed: int,
    cp: int,
    way: tuple[Way, int],
    kv_heads: int,
    scores: Scores,
    packed: bool,
    sunk: bool,
) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, length = rng.choice([1, 2]), rng.randint(cp, 23)
    starts = cut_at_random(rows, length, rng) if packed or cp == 1 else None
    structures = [
        SequenceCut(rank, cp, rng.choice([1]), (scores.window,)).of(batch_of(starts, rows, length))[1]
        for rank in range(cp)
    ]
    inputs = [
        torch.randn(rows, heads, length, 4, generator=generator, dtype=torch.float64)
        for heads in (12, kv_heads, kv_heads, 12)
    ]
    inner = way[1] or cp
    sinks = torch.randn(12, generator=generator, dtype=torch.float64) if sunk else None
    found = over_ranks(inputs, structures, way[0], inner if cp % inner == 0 else 1, scores, sinks)
    q, k, v, dy = inputs
    leaves = [x.requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    begins = torch.zeros(rows, length, dtype=torch.int64) if starts is None else starts
    y = definition(q, k, v, begins, scores, sinks)
    wanted = [y, *torch.autograd.grad(y, leaves, dy)]
    assert len(found) == len(wanted)
    for name, ours, theirs in zip(("y", "q", "k", "v", "sinks"), found, wanted, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_of_keys_leave_through_a_peer_buffer_as_over_a_group(rows: int, dtype: torch.dtype) -> None:
    """Bitwise; of bf16 in two messages, some heads in each. Catches heads of one in the place of the other's."""
    length, cp, generator = 23, 3, torch.Generator().manual_seed(3)
    starts = cut_at_random(rows, length, random.Random(5)) if rows > 1 else None
    structures = [SequenceCut(rank, cp).of(batch_of(starts, rows, length))[1] for rank in range(cp)]
    inputs = [torch.randn(rows, heads, length, 4, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]
    group, buffer = (over_ranks(inputs, structures, "all-gather", 1, Scores(), None, room) for room in (None, Room()))
    assert all(torch.equal(a, b) for a, b in zip(group, buffer, strict=True))


def test_sinks_of_plain_rows_are_by_the_same_kernels() -> None:
    """One process, and the last positions of a row whose earlier keys were kept, against torch's own softmax."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, h, 9, 4, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    sinks = torch.randn(4, generator=generator, dtype=torch.float64)
    attend = ContextAttention(causal_attention, Exact(), *axes(0, 1, 1), "ring")
    for scores in (Scores(), Scores(window=3)):
        wanted = definition(q, k, v, torch.zeros(2, 9, dtype=torch.int64), scores, sinks)
        for ours in (attend, causal_attention):
            torch.testing.assert_close(ours(q, k, v, scores, None, sinks), wanted, rtol=1e-12, atol=1e-14)
            last = ours(q[:, :, 6:], k, v, scores, None, sinks)
            torch.testing.assert_close(last, wanted[:, :, 6:], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", WAYS)
def test_a_document_changes_no_bit_of_another(way: tuple[Way, int]) -> None:
    """Outputs and gradients of all tokens of the other documents are bitwise what they were, infinities let in."""
    length, cp = 19, 4
    starts = torch.tensor([[0] * 4 + [4] * 9 + [13] * 6, [0] * 7 + [7] + [8] * 11])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, length, 4, generator=generator) for _ in range(4)]
    structures = [SequenceCut(rank, cp).of(batch_of(starts, 2, length))[1] for rank in range(cp)]
    before = over_ranks(inputs, structures, way[0], way[1] or cp, Scores())
    changed = [x.clone() for x in inputs]
    for x in changed[:3]:
        x[0, :, 4:13] = torch.inf
    after = over_ranks(changed, structures, way[0], way[1] or cp, Scores())
    others = torch.ones(2, length, dtype=torch.bool)
    others[0, 4:13] = False
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.transpose(1, 2)[others], b.transpose(1, 2)[others])
        assert not torch.equal(a, b)


def test_partial_outputs_are_merged_in_fp32() -> None:
    """In bf16, over four ranks, the error of a ring is that of one rank's attention: one rounding of the output."""
    length, generator = 64, torch.Generator().manual_seed(1)
    exact = [torch.randn(1, 2, length, 8, generator=generator).bfloat16().double() for _ in range(4)]
    wanted = definition(*exact[:3], torch.zeros(1, length, dtype=torch.int64), Scores())
    structures = [SequenceCut(rank, 4).of(batch_of(None, 1, length))[1] for rank in range(4)]
    y = over_ranks([x.bfloat16() for x in exact], structures, "ring", 1, Scores())[0]
    assert ((y.double() - wanted).abs() <= wanted.abs() * 2**-8).all()
