"""What a layer keeps from its forward for its backward, tensor by tensor, and what it costs to compute a part again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from stretto.arguments.schema import Arguments
from stretto.estimate.context import ATTENTION, NODE
from stretto.estimate.sizes import BYTES, local_tokens, most_crossing
from stretto.schedule.blocks import StageBlock

Parts = frozenset[str]
"""Of one layer what is recomputed: names of `recompute_parts`, or "block" for all but what enters it."""
NOTHING: Final[Parts] = frozenset()
BLOCK: Final[Parts] = frozenset({"block"})

GEMM: Final = 600e12
"""Operations a second of GEMMs in bf16 on Hopper."""
MEMORY: Final = 3.5e12
"""Bytes a second of its memory."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer and microbatch, by tensor. A recomputed block has the first alone."""

    residuals: int
    """What enters, and where attention has been added."""
    normed: int
    """What the first matrices take."""
    heads: int
    """Queries, keys and values."""
    attended: int
    """Attention's output, and its LSE."""
    inner: int
    """What enters the activation function."""
    activated: int
    """What leaves it; of experts all that they keep."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def kept(args: Arguments, block: StageBlock, parts: Parts = NOTHING) -> Kept:
    """What a block, as far as it is on a stage, keeps where `parts` are recomputed.

    Korthikanti et al. (2022) count 34 bytes a token and feature in bf16 without the attention's weights, which are
    never kept; here a norm keeps its input, attention q, k, v, its output and LSE, feed-forward what its GEMMs take.
    Under sequence parallelism a matrix keeps all of the sequence that it gathered; a norm, and a region that is
    recomputed, this rank's part.
    """
    m, p, item = args.model, args.parallel, BYTES[args.run.dtype]
    tokens = local_tokens(args)
    outside = tokens // p.tp if p.sequence_parallel else tokens
    sparse = block.feed_forward and m.is_sparse(block.layer)
    if parts == BLOCK:
        return Kept(item * outside * m.hidden, 0, 0, 0, 0, plan_bytes(args) * sparse)
    d, whole = m.dim_per_head, args.run.ffn_chunks == 1  # chunks are recomputed
    q, kv = m.heads * d // p.tp, max(1, m.num_kv_heads // p.tp) * d
    inner, again = m.dim_ffn // p.tp, "projections" in parts
    before = m.norm_placement != "post"
    entering = outside if again else tokens
    # Without a norm in front a matrix takes the residual itself, or what it gathers of it.
    normed = (0 if "norms" in parts else entering) if before else entering - outside
    normed *= m.hidden
    # After a norm that comes last its input is kept, too: what attention or feed-forward gave.
    after = 0 if m.norm_placement == "pre" else outside * m.hidden
    heads = 0 if again else tokens * (q + 2 * kv + (q + kv) * m.qk_norm + (q + 2 * kv) * (m.qkv_clip is not None))
    if m.latent:
        heads = 0 if again else tokens * latent_elements(args, selective="norms" in parts)
        heads += outside * m.hidden * reads_twice(args, parts)
    if (p.cp > 1 or args.data.packing) and not again and "attention" not in parts:
        heads += tokens * kv * (2 - m.qk_norm)  # keys beside values, as they go to other ranks; not as they were normed
    lse = 0 if again or "attention" in parts else tokens * m.heads // p.tp * max(4, item)
    attended = 0 if "attention" in parts else item * tokens * m.heads * m.dim_value // p.tp
    dense = 0 if again else tokens * whole * inner * (2 if m.gated else 1)
    activated = 0 if "activation" in parts else tokens * whole * inner
    routing = 0
    if sparse:
        selective, routing = "activation" in parts, router_bytes(args) + plan_bytes(args)
        dense, activated = 0, sparse_feed_forward(args, selective=selective) + outside * m.hidden * (not selective)
    first, second = block.attention, block.feed_forward
    return Kept(
        item * (first + second) * (outside * m.hidden + after),
        item * (normed * first + normed * (second and not sparse)),
        item * heads * first,
        (attended + lse) * first,
        item * dense * second,
        (item * activated + routing) * second,
    )


def working(args: Arguments, block: StageBlock, parts: Parts) -> int:
    """Bytes that are there while a region of the block is recomputed: its larger sublayer."""
    here = kept(args, block)
    if "projections" not in parts:
        return 0
    normed = here.normed // 2 if block.whole else here.normed
    return max(here.heads + here.attended, here.inner + here.activated) + normed


def seconds(args: Arguments, block: StageBlock, parts: Parts) -> float:
    """What recomputing `parts` of a block takes, of one microbatch, by a cost model of Hopper GPUs in bf16."""
    attention = sum(_attention_seconds(args, block.layer, parts)) if block.attention else 0.0
    return attention + (sum(_feed_forward_seconds(args, block.layer, parts)) if block.feed_forward else 0.0)


def _attention_seconds(args: Arguments, layer: int, parts: Parts) -> Iterator[float]:
    m, p, item = args.model, args.parallel, BYTES[args.run.dtype]
    tokens, h, d = local_tokens(args), args.model.hidden, args.model.dim_per_head
    q, kv = m.heads * d // p.tp, max(1, m.num_kv_heads // p.tp) * d
    gathers, leaves = _across(args)
    again, block = "projections" in parts, parts == BLOCK
    if "norms" in parts:  # made in the pass that makes their gradient: one write
        yield tokens * h * item / MEMORY + gathers
    if "attention" in parts or again or block:
        seen = min(args.batch.seq_len, m.window_of(layer) or args.batch.seq_len)
        yield 2 * tokens * seen * q / ATTENTION
    if again or block:
        yield 2 * tokens * h * (q + 2 * kv) / GEMM + gathers
        yield 3 * tokens * (q + 2 * kv) * item / MEMORY
    if block or (again and "attention" in parts):
        yield 2 * tokens * h * q / GEMM + leaves
    if block:
        yield 3 * tokens * h * item / MEMORY


def _feed_forward_seconds(args: Arguments, layer: int, parts: Parts) -> Iterator[float]:
    m, p, item = args.model, args.parallel, BYTES[args.run.dtype]
    tokens, h = local_tokens(args), args.model.hidden
    inner = (m.dim_ffn if not m.is_sparse(layer) else m.top_k * m.dim_expert + m.shared_ffn) // p.tp
    gathers, leaves = _across(args)
    again, block = "projections" in parts, parts == BLOCK
    if "norms" in parts:
        yield tokens * h * item / MEMORY + gathers
    if "activation" in parts and not again:
        yield tokens * inner * item / MEMORY
    if again or block:
        yield 2 * tokens * h * inner * (2 if m.gated else 1) / GEMM + gathers
        yield 9 * tokens * inner * item / MEMORY
    if block or (again and "activation" in parts):
        yield 2 * tokens * h * inner / GEMM + leaves
    if block:
        yield 3 * tokens * h * item / MEMORY


def _across(args: Arguments) -> tuple[float, float]:
    """Seconds of the collectives over tp with which a sublayer begins, and ends."""
    p = args.parallel
    one = local_tokens(args) * args.model.hidden * BYTES[args.run.dtype] * (p.tp - 1) / p.tp / NODE
    return one * p.sequence_parallel, one * (1 if p.sequence_parallel else 2)


def router_bytes(args: Arguments) -> int:
    """Bytes that a router keeps: logits, chosen experts and their weights."""
    m, wide = args.model, max(4, BYTES[args.run.dtype])
    return -(-local_tokens(args) // args.parallel.tp) * (m.experts * wide + m.top_k * (8 + wide))


def plan_bytes(args: Arguments) -> int:
    """Bytes that say where each row goes and where it comes back; where ranks exchange them, which tokens go where,
    which of those that came each row is of, and of more than one other rank in which order these came."""
    m, p = args.model, args.parallel
    share, ranks = -(-local_tokens(args) // p.tp), p.ep * p.etp
    away = 1 - 1 / ranks  # of the rows, those of other ranks' tokens
    each = 4 if ranks == 2 else 20
    exchanged = int(away * each * p.etp * m.top_k) + 8 * most_crossing(args) + 4 * m.top_k * p.etp
    return share * (8 * m.top_k * (1 + p.etp) + exchanged * (ranks > 1))


def reads_twice(args: Arguments, parts: Parts) -> bool:
    """Whether two matrices of attention read what a norm is recomputed for: then one keeps it."""
    return args.model.latent and "norms" in parts and args.model.q_lora_rank is None


def latent_elements(args: Arguments, *, selective: bool) -> int:
    """Elements that attention with latents keeps of a token: these, normed ones, queries and keys with their rotated
    parts behind them, and what values lie in."""
    m, heads = args.model, args.model.heads // args.parallel.tp
    normed = (m.kv_lora_rank or 0) + (m.q_lora_rank or 0)
    kept = normed + m.dim_rotary + normed * (not selective)
    return kept + heads * (2 * m.dim_per_head + m.dim_per_head - m.dim_rotary + m.dim_value)


def sparse_feed_forward(args: Arguments, *, selective: bool) -> int:
    """Elements that a sparse feed-forward keeps where experts have equal loads: of each assignment what its expert
    takes and what enters its activation; the shared expert as a dense one. Where the activation is recomputed
    it keeps what enters that, and where ranks exchange rows, these."""
    m, p, tokens = args.model, args.parallel, local_tokens(args)
    rows = -(-tokens // p.tp) * m.top_k
    enters = 2 if m.gated else 1
    arrived = 0 if selective and p.ep * p.etp == 1 else p.etp * m.hidden
    kept = rows * (arrived + m.dim_expert * enters) + tokens * m.shared_ffn // p.tp * (enters + 1 - selective)
    return kept + selective * tokens * m.hidden // p.tp  # the router's input is kept
