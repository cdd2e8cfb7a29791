"""Rules over context parallelism and packed documents, and bounds of what is in memory before the first step."""

from __future__ import annotations

from stretto.arguments.nearby import divisors, multiples
from stretto.arguments.rule import RuleViolation, clash, ordered, require, rule, told, violation
from stretto.arguments.schema import Arguments

MOST_PLANNED = 2**20
"""Microbatches times stages of one step: some seconds of planning."""

MOST_TOKENS = 2**22
"""Of a microbatch on one rank: 16 GB for each activation of a model of 1,024 channels in fp32."""

each_rank_has_a_token = require(
    "A row has a token for each context-parallel rank.",
    ordered("seq_len >= cp", seq_len="cp", cp="seq_len"),
)


@rule("cp_comm layers")
def each_layer_has_its_way(a: Arguments) -> RuleViolation | None:
    """One way of communication is said for all layers, or one for each."""
    said, layers = a.parallel.cp_comm, a.model.layers
    problem = f"cp_comm has {len(said)} entries, must be 1 or layers = {layers}"
    return violation(problem, cp_comm=(said[:1],)) if len(said) not in (1, layers) else None


@rule("cp_comm cp_a2a cp")
def hybrid_has_two_levels(a: Arguments) -> RuleViolation | None:
    """Hybrid communication has neighbours that exchange heads, several of them and several groups of them."""
    inner, fits = a.parallel.cp_a2a, tuple(n for n in range(2, a.parallel.cp) if a.parallel.cp % n == 0)
    if "hybrid" not in a.parallel.cp_comm or inner in fits:
        return None
    problem = told("cp_comm = hybrid with {cp_a2a}, must be a divisor of {cp} between 1 and cp", a)
    return violation(problem, cp_comm=(("auto",),), cp_a2a=fits)


@rule("cp_comm cp_a2a cp tp heads")
def heads_divide_by_cp(a: Arguments) -> RuleViolation | None:
    """Whoever exchanges heads has as many of them as ranks, or a multiple."""
    p, heads = a.parallel, a.model.heads // a.parallel.tp
    ranks = p.cp if "ulysses" in p.cp_comm else (p.cp_a2a or 1) if "hybrid" in p.cp_comm else 1
    if heads % ranks == 0:
        return None
    return violation(
        f"{told('{heads/tp}', a)} = {heads}, must be a multiple of the {ranks} ranks that exchange heads",
        cp_comm=(("auto",), ("ring",)),
        cp=divisors(heads, p.cp),
        heads=multiples(a.model.heads, ranks * p.tp),
    )


kernel_knows_of_documents = require(
    "Documents in one row, and rows on several ranks, need kernels that take their boundaries.",
    clash("{cp} with {attention}, whose kernels see one document on one rank", attention=["torch"], cp=[1]),
    clash("packing with {attention}, whose kernels see one document on one rank", attention=["torch"], packing=[False]),
)


@rule("ffn_chunks recompute seq_len cp tp sequence_parallel")
def chunks_have_tokens(a: Arguments) -> RuleViolation | None:
    """Each chunk of the sequence has a token, and a sequence in chunks is not also computed again by its norms."""
    chunks, p = a.run.ffn_chunks, a.parallel
    slots = -(-a.batch.seq_len // (p.cp * (p.tp if p.sequence_parallel else 1)))
    if chunks > 1 and a.run.recompute == "selective":
        problem = f"ffn_chunks = {chunks} with recompute = selective, must be none, block or offload"
        return violation(problem, recompute=("block",), ffn_chunks=(1,))
    problem = f"ffn_chunks = {chunks}, must be <= tokens of a sequence on a rank = {slots}"
    return violation(problem, ffn_chunks=(slots,)) if chunks > slots else None


@rule("global_batch micro_batch dp pp")
def schedule_is_bounded(a: Arguments) -> RuleViolation | None:
    """All microbatches of a step are planned at once, on every stage."""
    b, pp, share = a.batch, a.parallel.pp, a.batch.micro_batch * (a.parallel.dp or 1)
    planned = b.global_batch // share * pp
    if planned <= MOST_PLANNED:
        return None
    return violation(
        f"global_batch / (micro_batch*dp) * pp = {b.global_batch} / ({share}) * {pp} = {planned:,} microbatches on "
        f"stages, must be <= {MOST_PLANNED:,}",
        global_batch=multiples(MOST_PLANNED // pp * share, share),
        micro_batch=(b.micro_batch * -(-planned // MOST_PLANNED),),
    )


@rule("micro_batch seq_len cp")
def microbatch_is_bounded(a: Arguments) -> RuleViolation | None:
    """A microbatch is in memory as a whole."""
    b, most = a.batch, MOST_TOKENS * a.parallel.cp
    tokens = b.micro_batch * b.seq_len
    problem = f"{told('{micro_batch * seq_len}', a)} = {tokens:,} tokens, must be <= {most:,}"
    near = {"micro_batch": (max(MOST_TOKENS // b.seq_len, 1),), "seq_len": (MOST_TOKENS // b.micro_batch,)}
    return violation(problem, **near) if tokens > most else None
