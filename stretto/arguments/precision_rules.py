"""Rules over number formats."""

from __future__ import annotations

from typing import Final

from stretto.arguments.nearby import divisors, multiples, sizes
from stretto.arguments.rule import Nearby, RuleViolation, rule
from stretto.arguments.schema import Arguments

ROW: Final = 16
"""Matrix units take FP8 in rows of a multiple of so many."""


@rule("run.fp8", "run.dtype")
def fp8_is_within_bf16(a: Arguments) -> RuleViolation | None:
    """Gemms in fp8 take and give bf16."""
    if a.run.fp8 == "none" or a.run.dtype == "bf16":
        return None
    return RuleViolation(
        f"fp8 = {a.run.fp8} with dtype = {a.run.dtype}, must be bf16", {"run.dtype": ("bf16",), "run.fp8": ("none",)}
    )


@rule("run.fp8", "model.kv_lora_rank")
def fp8_has_no_latent(a: Arguments) -> RuleViolation | None:
    """Attention with a latent computes in the dtype of the run."""
    if a.run.fp8 == "none" or not a.model.latent:
        return None
    return RuleViolation(
        f"fp8 = {a.run.fp8} with kv_lora_rank = {a.model.kv_lora_rank}: not available yet", {"run.fp8": ("none",)}
    )


@rule(
    "run.attention",
    "run.device",
    "run.dtype",
    "model.head_dim",
    "model.window",
    "model.attention_softcap",
    "model.attention_scalar",
    "model.attention_sinks",
    "model.kv_lora_rank",
)
def flash_takes_what_it_is_given(a: Arguments) -> RuleViolation | None:
    """FlashAttention 4 runs on GPUs, in bf16, plain causal attention, heads of 8 to 256 features."""
    d, wrong = a.model.dim_per_head, []
    if a.run.attention == "torch":
        return None
    if a.run.device != "cuda":
        wrong.append(f"device = {a.run.device}, must be cuda")
    if a.run.dtype != "bf16":
        wrong.append(f"dtype = {a.run.dtype}, must be bf16")
    if d % 8 or d > 256:
        wrong.append(f"head_dim = {d}, must be a multiple of 8 up to 256")
    wrong += [f"kv_lora_rank = {a.model.kv_lora_rank}, must be unset"] * a.model.latent
    special = ("window", "attention_softcap", "attention_scalar")
    wrong += [f"{name} = {value:g}, must be unset" for name in special if (value := getattr(a.model, name)) is not None]
    wrong += ["attention_sinks, must be false"] * a.model.attention_sinks
    if not wrong:
        return None
    return RuleViolation(f"attention = {a.run.attention} with {'; '.join(wrong)}", {"run.attention": ("torch",)})


@rule(
    "run.fp8",
    "model.hidden",
    "model.heads",
    "model.kv_heads",
    "model.head_dim",
    "model.ffn",
    "parallel.tp",
    "batch.seq_len",
    "batch.micro_batch",
    "parallel.cp",
    "run.ffn_chunks",
)
def fp8_sizes_divide(a: Arguments) -> RuleViolation | None:
    """Gemms in fp8 have sizes that are multiples of 16 on each tensor-parallel rank, tokens among them."""
    m, b, tp, d = a.model, a.batch, a.parallel.tp, a.model.dim_per_head
    cp, chunks = a.parallel.cp, a.run.ffn_chunks
    parts = cp * chunks
    tokens, rest = divmod(b.seq_len, parts)  # where that is no whole number, parts have sizes of their own
    equation = f"seq_len*micro_batch = {b.seq_len}*{b.micro_batch}"
    if parts > 1:
        equation = f"seq_len/(cp*ffn_chunks)*micro_batch = {b.seq_len}/({cp}*{chunks})*{b.micro_batch}"
    heads, kv_heads = m.heads // tp, max(1, m.num_kv_heads // tp)
    by_head: Nearby = {"model.head_dim": sizes(d, ROW), "parallel.tp": divisors(m.heads, tp)}
    by_ffn: Nearby = {"model.ffn": sizes(m.dim_ffn, ROW * tp), "parallel.tp": divisors(m.dim_ffn, tp)}
    products: list[tuple[int, str, Nearby]] = [
        (m.hidden, f"hidden = {m.hidden}", {"model.hidden": sizes(m.hidden, ROW)}),
        (heads * d, f"heads/tp * head_dim = {heads}*{d}", by_head),
        ((heads + 2 * kv_heads) * d, f"(heads + 2*kv_heads)/tp * head_dim = ({heads}+2*{kv_heads})*{d}", by_head),
        (m.dim_ffn // tp, f"ffn/tp = {m.dim_ffn}/{tp}", by_ffn),
        (
            1 if rest else tokens * b.micro_batch,
            equation,
            {"batch.seq_len": sizes(b.seq_len, ROW * parts), "batch.micro_batch": multiples(b.micro_batch, ROW)},
        ),
    ]
    wrong = [(said, near) for size, said, near in products if size % ROW]
    if a.run.fp8 == "none" or not wrong:
        return None
    nearby: Nearby = {}
    for _, near in wrong:
        nearby |= near
    problem = ", ".join(said for said, _ in wrong)
    return RuleViolation(f"{problem}: must be a multiple of {ROW} for fp8", {**nearby, "run.fp8": ("none",)})
