"""Rules that bound what a run makes in memory before its first step: a record may say any number."""

from __future__ import annotations

from stretto.arguments.nearby import multiples
from stretto.arguments.rule import RuleViolation, rule
from stretto.arguments.schema import Arguments

MOST_PLANNED = 2**20
"""Microbatches times stages of one step: some seconds of planning."""

MOST_TOKENS = 2**22
"""Of a microbatch on one rank: 16 GB for each activation of a model of 1,024 channels in fp32."""


@rule("batch.global_batch", "batch.micro_batch", "parallel.dp", "parallel.pp")
def schedule_is_bounded(a: Arguments) -> RuleViolation | None:
    """All microbatches of a step are planned at once, on every stage."""
    share = a.batch.micro_batch * (a.parallel.dp or 1)
    m, pp = a.batch.global_batch // share, a.parallel.pp
    if m * pp <= MOST_PLANNED:
        return None
    fits = a.batch.micro_batch * -(-m * pp // MOST_PLANNED)
    return RuleViolation(
        f"global_batch / (micro_batch*dp) * pp = {a.batch.global_batch} / ({share}) * {pp} = {m * pp:,} microbatches "
        f"on stages, must be <= {MOST_PLANNED:,}",
        {"batch.global_batch": multiples(MOST_PLANNED // pp * share, share), "batch.micro_batch": (fits,)},
    )


@rule("batch.micro_batch", "batch.seq_len", "parallel.cp")
def microbatch_is_bounded(a: Arguments) -> RuleViolation | None:
    """A microbatch is in memory as a whole."""
    b, cp = a.batch, a.parallel.cp
    if b.micro_batch * b.seq_len <= MOST_TOKENS * cp:
        return None
    return RuleViolation(
        f"micro_batch * seq_len = {b.micro_batch} * {b.seq_len} = {b.micro_batch * b.seq_len:,} tokens, must be <= "
        f"{MOST_TOKENS * cp:,}",
        {"batch.micro_batch": (max(MOST_TOKENS // b.seq_len, 1),), "batch.seq_len": (MOST_TOKENS // b.micro_batch,)},
    )
