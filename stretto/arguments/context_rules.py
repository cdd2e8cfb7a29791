"""Rules over context parallelism and packed documents."""

from __future__ import annotations

from stretto.arguments.nearby import divisors, multiples
from stretto.arguments.rule import Nearby, RuleViolation, rule
from stretto.arguments.schema import Arguments


@rule("parallel.cp", "batch.seq_len")
def each_rank_has_a_token(a: Arguments) -> RuleViolation | None:
    """A row has a token for each context-parallel rank."""
    s, cp = a.batch.seq_len, a.parallel.cp
    if s >= cp:
        return None
    return RuleViolation(f"seq_len = {s}, must be >= cp = {cp}", {"batch.seq_len": (cp,), "parallel.cp": (s,)})


@rule("parallel.cp_comm", "model.layers")
def each_layer_has_its_way(a: Arguments) -> RuleViolation | None:
    """One way of communication is said for all layers, or one for each."""
    said, layers = len(a.parallel.cp_comm), a.model.layers
    if said in (1, layers):
        return None
    return RuleViolation(
        f"cp_comm has {said} entries, must be 1 or layers = {layers}", {"parallel.cp_comm": (a.parallel.cp_comm[:1],)}
    )


@rule("parallel.cp_comm", "parallel.cp_a2a", "parallel.cp")
def hybrid_has_two_levels(a: Arguments) -> RuleViolation | None:
    """Only hybrid communication has neighbours that exchange heads, several of them and several groups of them."""
    p = a.parallel
    inner, hybrid = p.cp_a2a, "hybrid" in p.cp_comm
    if hybrid == (inner is not None) and (inner is None or (p.cp % inner == 0 and 1 < inner < p.cp)):
        return None
    fits = tuple(n for n in range(2, p.cp) if p.cp % n == 0)
    nearby: Nearby = {"parallel.cp_comm": (("auto",),), "parallel.cp_a2a": fits if hybrid else (None,)}
    if not hybrid:
        return RuleViolation(f"cp_a2a = {inner}, but no layer has cp_comm = hybrid", nearby)
    return RuleViolation(
        f"cp_comm = hybrid with cp_a2a = {inner}, must be a divisor of cp = {p.cp} between 1 and cp",
        nearby if fits else {"parallel.cp_comm": (("auto",),)},
    )


@rule("parallel.cp_comm", "parallel.cp_a2a", "parallel.cp", "parallel.tp", "model.heads")
def heads_divide_by_cp(a: Arguments) -> RuleViolation | None:
    """Whoever exchanges heads has as many of them as ranks, or a multiple."""
    p = a.parallel
    ranks = p.cp if "ulysses" in p.cp_comm else (p.cp_a2a or 1) if "hybrid" in p.cp_comm else 1
    heads = a.model.heads // p.tp
    if heads % ranks == 0:
        return None
    return RuleViolation(
        f"heads/tp = {a.model.heads}/{p.tp} = {heads}, must be a multiple of the {ranks} ranks that exchange heads",
        {
            "parallel.cp_comm": (("auto",), ("ring",)),
            "parallel.cp": divisors(heads, p.cp),
            "model.heads": multiples(a.model.heads, ranks * p.tp),
        },
    )


@rule("run.attention", "parallel.cp", "data.packing")
def kernel_knows_of_documents(a: Arguments) -> RuleViolation | None:
    """Documents in one row, and rows on several ranks, need kernels that take their boundaries."""
    if a.run.attention == "torch" or (a.parallel.cp == 1 and not a.data.packing):
        return None
    said = f"cp = {a.parallel.cp}" if a.parallel.cp > 1 else "packing"
    return RuleViolation(
        f"{said} with attention = {a.run.attention}, whose kernels see one document on one rank",
        {"run.attention": ("torch",)},
    )


@rule("run.ffn_chunks", "run.recompute", "batch.seq_len", "parallel.cp", "parallel.tp", "parallel.sequence_parallel")
def chunks_have_tokens(a: Arguments) -> RuleViolation | None:
    """Each chunk of the sequence has a token, and a sequence in chunks is not also computed again by its norms."""
    chunks, p = a.run.ffn_chunks, a.parallel
    if chunks == 1:
        return None
    if a.run.recompute == "selective":
        return RuleViolation(
            f"ffn_chunks = {chunks} with recompute = selective, must be none, block or offload",
            {"run.recompute": ("block",), "run.ffn_chunks": (1,)},
        )
    tp = p.tp if p.sequence_parallel else 1
    slots = -(-a.batch.seq_len // (p.cp * tp))
    if chunks <= slots:
        return None
    return RuleViolation(
        f"ffn_chunks = {chunks}, must be <= tokens of a sequence on a rank = {slots}", {"run.ffn_chunks": (slots,)}
    )
