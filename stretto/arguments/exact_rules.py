"""What `exact` asks of sizes, and what it does not go with."""

from __future__ import annotations

from stretto.arguments.nearby import by_distance, divisors, multiples
from stretto.arguments.rule import RuleViolation, clash, clashes, require, rule, violation
from stretto.arguments.schema import Arguments


@rule("exact tp heads kv_heads ffn hidden seq_len")
def slices_divide(a: Arguments) -> RuleViolation | None:
    """Slices are so many that their sums are a tree, tp divides them, and they divide heads, ffn and seq_len."""
    n, tp, s, kv = a.parallel.exact, a.parallel.tp, a.batch.seq_len, a.model.num_kv_heads

    def wrong(n: int) -> list[str]:
        if n & (n - 1):
            return ["must be a power of two"]
        found = [f"must be a multiple of tp = {tp}"] if n % tp else []
        sizes = {"heads": a.model.heads, "ffn": a.model.dim_ffn, "seq_len": s}
        found += [f"must divide {name} = {size}" for name, size in sizes.items() if size % n]
        return found + ([f"must divide or be divided by kv_heads = {kv}"] if kv % n and n % kv else [])

    if n is None or not (said := wrong(n)):
        return None
    return violation(
        f"exact = {n} {', '.join(said)}",
        exact=by_distance(n, [p for p in (2**k for k in range(20)) if not wrong(p)]),
        tp=divisors(n, tp) if n % tp else (),
        seq_len=multiples(s, n) if s % n else (),
    )


exact_has_slices_of_all = require(
    "What is exact is computed in slices, by the same kernels whatever tp is.",
    clashes(
        "{exact} with ...: not available",
        clash("{cp}", cp=[1]),
        clash("{experts}", experts=[0]),
        clash("{kv_lora_rank}", kv_lora_rank=[None]),
        clash("{mtp_layers}", mtp_layers=[0]),
        clash("{lora_rank}", lora_rank=[0]),
        clash("compile = true, whose kernels differ from shape to shape", "compile", compile=[False]),
        clash("{fp8}", fp8=["none"]),
        clash("{ffn_chunks}", ffn_chunks=[1]),
        clash("{threads}, of which a CPU rank has one", "device == 'cpu' and threads", threads=[1]),
        exact=[None],
    ),
)
