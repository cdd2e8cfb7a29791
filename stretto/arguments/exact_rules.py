"""What `exact` asks of sizes, and what it does not go with."""

from __future__ import annotations

from stretto.arguments.nearby import by_distance, divisors, multiples
from stretto.arguments.rule import Nearby, RuleViolation, rule
from stretto.arguments.schema import Arguments

_SIZES = ("parallel.tp", "model.heads", "model.kv_heads", "model.ffn", "model.hidden", "batch.seq_len")


@rule("parallel.exact", *_SIZES)
def slices_divide(a: Arguments) -> RuleViolation | None:
    """Slices are so many that their sums are a tree, tp divides them, and they divide heads, ffn and seq_len."""
    n, m = a.parallel.exact, a.model
    if n is None:
        return None

    def wrong(n: int) -> list[str]:
        kv = m.num_kv_heads
        if n & (n - 1):
            return ["must be a power of two"]
        found = [f"must be a multiple of tp = {a.parallel.tp}"] if n % a.parallel.tp else []
        sizes = {"heads": m.heads, "ffn": m.dim_ffn, "seq_len": a.batch.seq_len}
        found += [f"must divide {name} = {size}" for name, size in sizes.items() if size % n]
        return found + ([f"must divide or be divided by kv_heads = {kv}"] if kv % n and n % kv else [])

    said = wrong(n)
    if not said:
        return None
    powers = [p for p in (2**k for k in range(20)) if not wrong(p)]
    nearby: Nearby = {"parallel.exact": by_distance(n, powers)}
    if n % a.parallel.tp:
        nearby["parallel.tp"] = divisors(n, a.parallel.tp)
    if a.batch.seq_len % n:
        nearby["batch.seq_len"] = multiples(a.batch.seq_len, n)
    return RuleViolation(f"exact = {n} {', '.join(said)}", nearby)


@rule(
    *("parallel.exact", "parallel.cp", "model.experts", "model.kv_lora_rank", "model.mtp_layers", "tuning.lora_rank"),
    *("run.compile", "run.fp8", "run.ffn_chunks", "run.threads", "run.device"),
)
def exact_has_slices_of_all(a: Arguments) -> RuleViolation | None:
    """What is exact is computed in slices, by the same kernels whatever tp is."""
    m, r = a.model, a.run
    wrong: dict[str, Nearby] = {
        f"cp = {a.parallel.cp}": {"parallel.cp": (1,)} if a.parallel.cp > 1 else {},
        f"experts = {m.experts}": {"model.experts": (0,)} if m.experts else {},
        f"kv_lora_rank = {m.kv_lora_rank}": {"model.kv_lora_rank": (None,)} if m.latent else {},
        f"mtp_layers = {m.mtp_layers}": {"model.mtp_layers": (0,)} if m.mtp_layers else {},
        f"lora_rank = {a.tuning.lora_rank}": {"tuning.lora_rank": (0,)} if a.tuning.lora_rank else {},
        "compile = true, whose kernels differ from shape to shape": {"run.compile": (False,)} if r.compile else {},
        f"fp8 = {r.fp8}": {"run.fp8": ("none",)} if r.fp8 != "none" else {},
        f"ffn_chunks = {r.ffn_chunks}": {"run.ffn_chunks": (1,)} if r.ffn_chunks > 1 else {},
        f"threads = {r.threads}, of which a CPU rank has one": {"run.threads": (1,)}
        if r.device == "cpu" and (r.threads or 1) > 1
        else {},
    }
    if a.parallel.exact is None or not any(wrong.values()):
        return None
    said = "; ".join(what for what, near in wrong.items() if near)
    nearby = {path: values for near in wrong.values() for path, values in near.items()}
    return RuleViolation(
        f"exact = {a.parallel.exact} with {said}: not available", {**nearby, "parallel.exact": (None,)}
    )
