"""How long a sublayer of a block takes: operations and bytes at a chip's rates, forward and for both gradients."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from stretto.arguments.schema import Arguments
from stretto.estimate.attention import attention_matrices
from stretto.estimate.chips import Chip
from stretto.estimate.context import comm_of, exchanged
from stretto.estimate.passes import Passes, StepTime
from stretto.estimate.sizes import BYTES, crossing, local_tokens


def sublayer_shares(args: Arguments, chip: Chip) -> tuple[float, float, float]:
    """Of what F, I and W of the first layer take, attention's share."""
    each = (
        (passes.forward.total, passes.inputs.total, passes.weights.total)
        for passes in (attention(args, chip, 0), feed_forward(args, chip, 0))
    )
    f, i, w = (first / (first + second) for first, second in zip(*each, strict=True))
    return f, i, w


def attention(args: Arguments, chip: Chip, layer: int) -> Passes:
    """Attention and the norm before it, or behind."""
    m, p, tokens = args.model, args.parallel, local_tokens(args)
    q = m.heads // p.tp * m.dim_per_head
    sizes = [(a.rows // (p.tp if a.cut == "rows" else 1), a.columns // (p.tp if a.cut == "columns" else 1))
             for a in attention_matrices(m)]  # fmt: skip
    products = sum(product(args, chip, tokens, rows, columns) for rows, columns in sizes)
    length = args.batch.seq_len
    window = min(length, m.window_of(layer) or length)
    seen = 2 * window - window**2 / length  # twice the keys of a query, in the mean
    attended = (
        tokens * seen * q * (length + chip.half_length) / length * (m.dim_per_head + chip.half_head) / m.dim_per_head
    )
    kv = m.num_kv_heads * m.dim_per_head / p.tp
    passes = _passes(args, chip, 4 * tokens * (q + kv))
    forward, backward = (list(_exchanged_by_attention(args, chip, layer, backward=back)) for back in (False, True))
    return Passes(
        StepTime(products, 2 * attended / chip.forward, 0.4 * passes, communication=sum(forward)),
        StepTime(products, 5 * attended / chip.backward, 0.6 * passes, communication=sum(backward)),
        StepTime(products),
    )


def feed_forward(args: Arguments, chip: Chip, layer: int) -> Passes:
    """A dense feed-forward, or experts, with their norm."""
    m, p, tokens = args.model, args.parallel, local_tokens(args)
    h, gates, sparse = m.hidden, 2 if m.gated else 1, m.is_sparse(layer)
    inner = (m.shared_ffn if sparse else m.dim_ffn) // p.tp
    sizes = [(inner * gates, h), (h, inner)] if inner else []
    products = sum(product(args, chip, tokens, rows, columns) for rows, columns in sizes)
    rows = tokens / p.tp * m.top_k if sparse else 0.0
    of_experts = ((m.dim_expert * gates, h), (h, m.dim_expert)) if sparse else ()
    products += chip.grouped * sum(product(args, chip, rows, n, k) for n, k in of_experts)
    passes = _passes(args, chip, 3 * tokens * (0 if sparse else inner) * gates)
    item = BYTES[args.run.dtype]
    passes += item * rows * (5 * h + 8 * m.dim_expert) / chip.memory
    if sparse and p.ep * p.etp > 1:
        # Rows of others are put in order as they come and as they go back, forward and back: read and written. A rank's
        # own are moved beside what came.
        own = 1 / (p.ep * p.etp)
        passes += (4 * (1 - own) + 2 * own) * 2 * item * rows * p.etp * h / chip.memory
    if sparse:
        # Gradients of experts are written in fp32, and read by all microbatches but the first: few rows hide it.
        weights = m.experts // (p.ep * p.etp) * (gates + 1) * h * m.dim_expert
        passes += chip.routing + 4 * (2 - 1 / args.batch.microbatches(p.dp)) * weights / chip.memory
    forward, backward = (list(_exchanged_by_feed_forward(args, chip, layer, backward=back)) for back in (False, True))
    return Passes(
        StepTime(products, 0.0, 0.4 * passes, communication=sum(forward)),
        StepTime(products, 0.0, 0.6 * passes, communication=sum(backward)),
        StepTime(products),
    )


def _passes(args: Arguments, chip: Chip, inner: float) -> float:
    """Seconds of the elementwise passes of a sublayer over the residual stream and so many `inner` elements."""
    outside = local_tokens(args) / (args.parallel.tp if args.parallel.sequence_parallel else 1)
    moved = BYTES[args.run.dtype] * (8 * outside * args.model.hidden + inner) * chip.pass_over
    return moved / chip.memory * (chip.casts if args.run.fp8 != "none" else 1)


def product(args: Arguments, chip: Chip, tokens: float, rows: float, columns: float) -> float:
    """Seconds of x W^T, W [rows, columns]."""
    rate = chip.gemm if args.run.fp8 == "none" else chip.fp8
    least = min(rows, columns)
    return 2 * tokens * rows * columns / rate * (least + chip.half_side) / max(least, 1)


def _exchanged_by_attention(args: Arguments, chip: Chip, layer: int, *, backward: bool) -> Iterator[float]:
    """Seconds of what attention communicates on tp and cp in one direction."""
    if args.parallel.tp > 1:
        yield _exchanged_by_sublayer(args, chip, backward=backward)
    if args.parallel.cp > 1:
        yield exchanged(args, comm_of(args, layer), layer).seconds * (2 / 3 if backward else 1 / 3)


def _exchanged_by_feed_forward(args: Arguments, chip: Chip, layer: int, *, backward: bool) -> Iterator[float]:
    """Seconds of what a feed-forward communicates on tp and ep in one direction."""
    m, p, item = args.model, args.parallel, BYTES[args.run.dtype]
    if p.tp > 1:
        yield _exchanged_by_sublayer(args, chip, backward=backward)
    group = p.ep * p.etp
    if m.is_sparse(layer) and group > 1:
        rate = min(chip.exchange, rate_between(args, chip, group))
        for rows, behind in _of_experts(args, chip, backward=backward):
            sent = rows * m.hidden * item / rate + chip.latency
            yield max(chip.contention * sent, sent - behind)


def _of_experts(args: Arguments, chip: Chip, *, backward: bool) -> Iterator[tuple[float, float]]:
    """What goes to experts and comes back, in rows, and the seconds of GEMMs that are behind it: of a rank's own rows,
    where copy engines leave them the multiprocessors. Each assignment goes one way, each token the other."""
    m, p = args.model, args.parallel
    rows, group, f = local_tokens(args) / p.tp * m.top_k * p.etp, p.ep * p.etp, m.dim_expert * (2 if m.gated else 1)
    first, last = (chip.grouped * product(args, chip, rows, *of) for of in ((f, m.hidden), (m.hidden, m.dim_expert)))
    behind = [last / group, first / group + last] if backward else [first / group, last / group]
    if p.ep_comm_overlap:  # a half computes meanwhile; what is exposed at the ends of a stage is not counted
        behind = [inf, inf]
    elif not p.ep_copy_engines:
        behind = [0.0, 0.0]
    # What comes from a rank's own tokens goes nowhere.
    yield from zip((rows / (m.top_k * p.etp) * crossing(args), rows * (1 - 1 / group)), behind, strict=True)


def _exchanged_by_sublayer(args: Arguments, chip: Chip, *, backward: bool) -> float:
    """Seconds of the collectives over tp around a sublayer in one direction."""
    p, item = args.parallel, BYTES[args.run.dtype]
    once = local_tokens(args) * args.model.hidden * item * (p.tp - 1) / p.tp / rate_between(args, chip, p.tp)
    calls = 3 if backward and p.sequence_parallel else 2
    share = chip.contention if p.tp_comm_overlap else 1.0
    return calls * (once * share + chip.latency * (not p.tp_comm_overlap))


def rate_between(args: Arguments, chip: Chip, ranks: int) -> float:
    """Between so many ranks that are neighbours in the order of ranks."""
    node = args.parallel.gpus_per_node
    return chip.between if node and ranks > node else chip.node
