"""How ranks of cp communicate where that is left to us, by a cost model of a layer's forward and backward; and which
layers are alike."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Final, Literal, NamedTuple

from stretto.arguments.schema import Arguments
from stretto.estimate.sizes import BYTES
from stretto.schedule.blocks import StageBlock, Sublayers

Comm = Literal["all-gather", "needed", "ring", "ulysses", "hybrid"]
BY_ROWS: Final = ("all-gather", "needed")
"""Ways in which keys and values come of all ranks at once."""

NODE: Final = 300e9
"""Bytes a second that a GPU gets from others of its node: NCCL over NVLink 4, less than the 450e9 of the wires."""
BETWEEN: Final = 40e9
"""Across nodes: a share of 400 Gbit/s."""
LATENCY: Final = 20e-6
"""Seconds of a collective, and of each step of a ring."""
ATTENTION: Final = 450e12
"""Operations a second of attention in bf16 on Hopper: what transfers are hidden behind."""
DOCUMENTS: Final = 10
"""A packed row has so many documents, as far as attention goes: of the pairs of a query and a key that a row of one
document has, those of log-normal lengths keep 0.05 to 0.09."""
OF_DOCUMENTS: Final = 0.5
"""Of the keys of other ranks the share that the rank that needs most of them does, where rows are packed:
`benchmarks.needed_keys` finds 0.24 to 0.6."""


@dataclass(frozen=True)
class Exchanged:
    """Of one layer and microbatch on one rank, forward and backward: bytes that come, and what they cost in seconds."""

    bytes: int
    seconds: float


def exchanged(args: Arguments, comm: Comm, layer: int = 0) -> Exchanged:
    """What a layer communicates that way.

    All-gather and ring bring keys and values of the other ranks, once more for the backward, and their gradients in
    fp32 or wider; where only what is needed comes, a share of it, on the rank that needs most. Ulysses exchanges
    queries, keys, values and the output, and the gradients of all four. Keys are hidden behind attention as far as
    that goes: of a ring behind all blocks but the last, else behind the squares along the diagonal.
    """
    p, m, b = args.parallel, args.model, args.batch
    item, tokens = BYTES[args.run.dtype], -(-b.seq_len // p.cp) * b.micro_batch
    heads, kv = m.heads // p.tp, max(1, m.num_kv_heads // p.tp)
    across = p.cp * p.tp > (p.gpus_per_node or p.cp * p.tp)
    inner = p.cp if comm == "ulysses" else (p.cp_a2a or 1) if comm == "hybrid" else 1
    outer = p.cp // inner
    rate_inner = BETWEEN if across and inner * p.tp > (p.gpus_per_node or 0) else NODE
    rate_outer = BETWEEN if across else NODE
    copies = inner // gcd(kv, inner)
    by_heads = 2 * tokens * m.dim_per_head * item * (2 * heads + 2 * kv * copies) * (inner - 1) // inner
    # After heads were exchanged a rank has 1/inner of them, of inner times the tokens.
    one = 2 * tokens * m.dim_per_head * kv * copies
    share = needed_share(args, layer) if comm == "needed" else 1.0
    by_keys = int((outer - 1) * one * (2 * item + max(4, item)) * share)
    seen, squares = _attention(args, layer)
    compute = 3.5 * 4 * tokens * heads * m.dim_per_head * seen / ATTENTION
    ring = comm in ("ring", "hybrid")
    behind = compute * ((outer - 1) / outer if ring else squares)
    steps = 3 * (outer - 1 if ring else outer > 1)
    seconds = by_heads / rate_inner + 4 * LATENCY * (inner > 1)
    seconds += max(0.0, by_keys / rate_outer - behind) + steps * LATENCY
    return Exchanged(by_heads + by_keys, seconds)


def _attention(args: Arguments, layer: int) -> tuple[float, float]:
    """Keys that a query sees in the mean, and the share of them in squares: in the same block, of two on each rank."""
    cp, packing = args.parallel.cp, args.data.packing
    length = args.batch.seq_len / (DOCUMENTS if packing else 1)
    window, block = min(args.model.window_of(layer) or length, length), args.batch.seq_len / (2 * cp)
    every, within = window - window**2 / (2 * length), min(window, block)
    return every, 1 / cp if packing else (within - within**2 / (2 * block)) / every


def needed_share(args: Arguments, layer: int) -> float:
    """Of the keys of other ranks, those that the rank with the most of them needs: where each row is one document its
    last queries see all. A window reaches so far before each of the two blocks of a rank."""
    p, window = args.parallel, args.model.window_of(layer)
    others = (p.cp - 1) * -(-args.batch.seq_len // p.cp)
    seen = 1.0 if window is None else 2 * (window - 1) / max(1, others)
    return min(OF_DOCUMENTS if args.data.packing else 1.0, seen)


def comm_of(args: Arguments, layer: int) -> Comm:
    """How a layer communicates: as said, or what costs least, and of two that cost the same the first.

    A layer behind the last, which predicts a further token, is said to do as the last does.
    """
    p = args.parallel
    said = p.cp_comm[min(layer, len(p.cp_comm) - 1)]
    if said != "auto":
        return said
    ways: list[Comm] = ["all-gather", "ring", "needed"]
    if (args.model.heads // p.tp) % p.cp == 0:
        ways.append("ulysses")
    return min(ways, key=lambda way: exchanged(args, way, layer).seconds)


def every_comm(args: Arguments) -> tuple[Comm, ...]:
    """The ways of all layers, each once."""
    return tuple(dict.fromkeys(comm_of(args, layer) for layer in range(args.model.further_layers.stop)))


class Kind(NamedTuple):
    """What the time and the memory of a layer follow from: layers of one kind are alike."""

    sparse: bool
    window: int | None
    comm: Comm | None
    """Over several ranks of cp."""
    sublayers: Sublayers


def kind_of(args: Arguments, block: StageBlock) -> Kind:
    """Of a layer, as far as it is on a stage."""
    m, layer = args.model, block.layer
    sparse = block.feed_forward and m.is_sparse(layer)
    window, cp = (m.window_of(layer), args.parallel.cp) if block.attention else (None, 1)
    return Kind(sparse, window, comm_of(args, layer) if cp > 1 else None, block.sublayers)
