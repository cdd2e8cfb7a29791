"""Rules over how a run computes: number formats, kernels, CUDA graphs, and what is recomputed."""

from __future__ import annotations

from typing import Final

from stretto.arguments.nearby import divisors, multiples, sizes
from stretto.arguments.recomputation import USUAL
from stretto.arguments.rule import Expression, RuleViolation, clash, clashes, ordered, require, rule, told, violation
from stretto.arguments.schema import Arguments
from stretto.notation.size import bytes_of

ROW: Final = 16
"""Matrix units take FP8 in rows of a multiple of so many."""

fp8_is_within_bf16 = require(
    "Gemms in fp8 take and give bf16.", clash("{fp8} with {dtype}, must be bf16", dtype=["bf16"], fp8=["none"])
)
fp8_has_no_latent = require(
    "Attention with a latent computes in the dtype of the run.",
    clash("{fp8} with {kv_lora_rank}: not available yet", "kv_lora_rank", fp8=["none"]),
)
flash_takes_what_it_is_given = require(
    "FlashAttention 4 runs on GPUs, in bf16, plain causal attention, heads of 8 to 256 features.",
    clashes(
        "{attention} with ...",
        clash("{device}, must be cuda", "device != 'cuda'"),
        clash("{dtype}, must be bf16", "dtype != 'bf16'"),
        clash("{head_dim}, must be a multiple of 8 up to 256", "head_dim and (head_dim % 8 or head_dim > 256)"),
        clash("{kv_lora_rank}, must be unset", "kv_lora_rank"),
        clash("{window}, must be unset", "window"),
        clash("{attention_softcap}, must be unset", "attention_softcap"),
        clash("{attention_scalar}, must be unset", "attention_scalar"),
        clash("attention_sinks, must be false", "attention_sinks"),
        attention=["torch"],
    ),
)


@rule("fp8 hidden heads kv_heads head_dim ffn tp seq_len micro_batch cp ffn_chunks")
def fp8_sizes_divide(a: Arguments) -> RuleViolation | None:
    """Gemms in fp8 have sizes that are multiples of 16 on each tensor-parallel rank, tokens among them."""
    m, b, tp, d = a.model, a.batch, a.parallel.tp, a.model.dim_per_head
    parts = a.parallel.cp * a.run.ffn_chunks
    tokens, rest = divmod(b.seq_len, parts)  # where that is no whole number, parts have sizes of their own
    heads, kv_heads = m.heads // tp, max(1, m.num_kv_heads // tp)
    by_head = {"head_dim": sizes(d, ROW), "tp": divisors(m.heads, tp)}
    of_seq = {"seq_len": sizes(b.seq_len, ROW * parts), "micro_batch": multiples(b.micro_batch, ROW)}
    equation = "{seq_len*micro_batch}" if parts == 1 else "{seq_len/(cp*ffn_chunks)*micro_batch}"
    gemms = [
        (m.hidden, f"hidden = {m.hidden}", {"hidden": sizes(m.hidden, ROW)}),
        (heads * d, f"heads/tp * head_dim = {heads}*{d}", by_head),
        ((heads + 2 * kv_heads) * d, f"(heads + 2*kv_heads)/tp * head_dim = ({heads}+2*{kv_heads})*{d}", by_head),
        (m.dim_ffn // tp, told("{ffn/tp}", a), {"ffn": sizes(m.dim_ffn, ROW * tp), "tp": divisors(m.dim_ffn, tp)}),
        (1 if rest else tokens * b.micro_batch, told(equation, a), of_seq),
    ]
    wrong = [(said, near) for size, said, near in gemms if size % ROW]
    if a.run.fp8 == "none" or not wrong:
        return None
    nearby = {name: values for _, near in wrong for name, values in near.items()}
    problem = f"{', '.join(said for said, _ in wrong)}: must be a multiple of {ROW} for fp8"
    return violation(problem, **nearby, fp8=("none",))


_NO_GRAPHS = (
    ("device != 'cuda'", "{device} has none"),
    ("exact is not None", "{exact}: kernels must be chosen alike for every tp"),
    ("pp > 1", "{pp}: stages wait for each other"),
    ("cp > 1", "{cp}: its collectives are not recorded"),
    ("schedule != '1f1b'", "{schedule}: backwards do not follow their forwards"),
    ("sharding in ('zero2', 'fsdp')", "{sharding}: gradients have no address of their own"),
    (
        "dp and dp > 1 and global_batch // (micro_batch*dp) == 1",
        "{dp} with one microbatch, whose backward sends gradients",
    ),
    ("packing", "packing: documents differ from one microbatch to the next"),
    ("experts and (ep > 1 or etp > 1)", "{ep}, {etp}: the host waits for how many rows come from other ranks"),
    ("experts and tp > 1", "{experts} with {tp}: not measured yet"),
    ("experts and expert_capacity", "{expert_capacity}: the host waits for how many rows are left"),
    ("experts and bias", "bias of {experts}: the host adds one to each expert's rows"),
    ("experts and dtype != 'bf16'", "{experts} in {dtype}: a GEMM for each expert, as large as the router says"),
    ("experts and not compile", "{experts} without compile: a GEMM for each expert's gradient"),
    (
        "experts and (hidden % 128 or expert_ffn % 128)",
        "{hidden}, {expert_ffn}: weight gradients of all experts in one kernel want multiples of 128",
    ),
    ("recompute == 'offload'", "recompute = offload: the host's memory takes part"),
    ("on_nonfinite != 'stop'", "{on_nonfinite} looks at each microbatch"),
    ("check_finite", "check_finite looks at each microbatch"),
    ("check_collectives", "check_collectives waits for the host"),
)
"""Where microbatches cannot be CUDA graphs, and why: launches differ from one to the next, or wait for the host."""

graphs_can_be_recorded = require(
    "CUDA graphs are of microbatches whose launches are the same each time, and that meet no other rank.",
    *(
        clash(f"{{cuda_graphs}}, but {why}", f"cuda_graphs and ({where})", cuda_graphs=[False])
        for where, why in _NO_GRAPHS
    ),
)
_REASONS = tuple((Expression(where), why) for where, why in _NO_GRAPHS)


def without_graphs(a: Arguments) -> str:
    """Why microbatches cannot be CUDA graphs, with the number; empty where they can."""
    return next((told(why, a) for holds, why in _REASONS if holds(a)), "")


@rule("recompute_parts")
def parts_are_chosen_once(a: Arguments) -> RuleViolation | None:
    """Parts of a block are named for selective recomputation, each once."""
    parts, once = a.run.recompute_parts, tuple(dict.fromkeys(a.run.recompute_parts))
    problem = told("{recompute_parts}: must name parts, each once", a)
    return violation(problem, recompute_parts=(once or USUAL,)) if not parts or once != parts else None


@rule("recompute_parts recompute experts")
def projections_are_of_dense_layers(a: Arguments) -> RuleViolation | None:
    """Inner features of experts are not recomputed by the projections."""
    parts = a.run.recompute_parts
    if a.run.recompute != "selective" or "projections" not in parts or not a.model.experts:
        return None
    rest = tuple(part for part in parts if part != "projections") or USUAL
    problem = told("{recompute_parts} with {experts}: projections are those of dense layers", a)
    return violation(problem, recompute_parts=(rest,))


so_many_layers_are_recomputed = require(
    "No more layers are recomputed than there are.", ordered("recompute_layers <= layers", recompute_layers="layers")
)


@rule("activation_budget")
def _is_a_size(a: Arguments) -> RuleViolation | None:
    try:
        bytes_of(a.run.activation_budget or "0")
    except ValueError as error:
        return violation(f"activation_budget: {error}", activation_budget=("20GB",))
    return None


a_budget_chooses = require(
    "A budget is a size, and chooses what is recomputed by itself.",
    _is_a_size,
    clash(
        "{activation_budget} with {recompute}: a budget chooses what is recomputed",
        recompute=["none"],
        activation_budget=[None],
    ),
    clash(
        "{activation_budget} with {ffn_chunks}: a budget takes the sequence as a whole",
        ffn_chunks=[1],
        activation_budget=[None],
    ),
)
