"""Rules over the parts of a model, experts and the ranks that they are spread over among them."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.arguments.compute_rules import ROW
from stretto.arguments.nearby import divisors, multiples, sizes
from stretto.arguments.rule import RuleViolation, clash, divisible, ordered, require, rule, told, violation
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value


@rule("global_layers layers")
def global_layers_exist(a: Arguments) -> RuleViolation | None:
    """Layers without the window are layers of the model, each named once."""
    return _layers_exist("global_layers", a.model.global_layers, a.model.layers)


@rule("dense_layers layers")
def dense_layers_exist(a: Arguments) -> RuleViolation | None:
    """Layers without experts are layers of the model, each named once."""
    return _layers_exist("dense_layers", a.model.dense_layers, a.model.layers)


def _layers_exist(name: str, said: tuple[int, ...], layers: int) -> RuleViolation | None:
    kept, beyond = tuple(sorted({n for n in said if n < layers})), [n for n in said if n >= layers]
    if beyond:
        return violation(f"{name} has {beyond[0]}, must be < layers = {layers}", **{name: (kept,)})
    return violation(f"{name} names one twice", **{name: (kept,)}) if len(kept) < len(said) else None


positions_hold_a_sequence = require(
    "A learned embedding has a position for each token of a sequence.",
    ordered(
        "learned_positions >= seq_len",
        "position == 'learned'",
        seq_len="learned_positions",
        learned_positions="seq_len",
    ),
)


@rule("rope_share head_dim position")
def rotated_share_has_pairs(a: Arguments) -> RuleViolation | None:
    """The rotated share of a head is a whole number of pairs."""
    m, d = a.model, a.model.dim_per_head
    if m.position != "rope" or m.rope_share == 1 or (m.dim_rotary and m.dim_rotary % 2 == 0):
        return None
    problem = f"rope_share * head_dim = {m.rope_share:g} * {d} -> {m.dim_rotary}, must be even and at least 2"
    return violation(problem, rope_share=(1.0, 0.5), head_dim=sizes(d, 8))


@rule("rope_scaling rope_original_positions seq_len")
def stretch_has_an_origin(a: Arguments) -> RuleViolation | None:
    """All but a linear stretch go by what a model was first trained with."""
    if a.model.rope_scaling in ("none", "linear") or a.model.rope_original_positions is not None:
        return None
    problem = f"rope_scaling = {a.model.rope_scaling} without rope_original_positions"
    return violation(problem, rope_original_positions=(a.batch.seq_len,), rope_scaling=("none",))


@rule("rope_short_factors rope_long_factors rope_scaling head_dim rope_share")
def each_pair_has_its_factor(a: Arguments) -> RuleViolation | None:
    """With longrope each rotated pair of a head has a factor of its own."""
    m, pairs = a.model, a.model.dim_rotary // 2
    short, long = len(m.rope_short_factors), len(m.rope_long_factors)
    if m.rope_scaling != "longrope" or short == long == pairs:
        return None
    said = f"rope_short_factors has {short}, rope_long_factors has {long}"
    return violation(f"{said}, must be one for each of {pairs} pairs of a head", rope_scaling=("none",))


stretch_has_a_ramp = require(
    "Between the wavelengths that are stretched and those that are not lies a range.",
    ordered(
        "rope_low_freq < rope_high_freq",
        "rope_scaling == 'llama3'",
        rope_low_freq="rope_high_freq / 4",
        rope_high_freq="rope_low_freq * 4",
    ),
)

parallel_residual_has_norms_before = require(
    "Two branches that read the same residual have their norms in front.",
    clash("parallel_residual with {norm_placement}, must be pre", norm_placement=["pre"], parallel_residual=[False]),
)


@rule("kv_lora_rank head_dim rope_head_dim v_head_dim position bias qkv_bias qk_norm qkv_clip")
def latent_has_its_heads(a: Arguments) -> RuleViolation | None:
    """Attention with a latent rotates a part of each head, and has no biases, no norms of heads and no bounds."""
    m, r, d = a.model, a.model.dim_rotary, a.model.dim_per_head
    near: dict[str, Sequence[Value]] = {}
    wrong = []
    if m.position != "rope":
        wrong.append(f"position = {m.position}, must be rope")
        near["position"] = ("rope",)
    if r % 2 or not 0 < r < d:
        wrong.append(f"rope_head_dim = {r}, must be even and below head_dim = {d}")
        near |= {"rope_head_dim": (max(2, d // 4 * 2),) if d > 2 else (), "head_dim": () if d > 2 else (4,)}
    if m.dim_value > d:
        wrong.append(f"v_head_dim = {m.dim_value}, must be <= head_dim = {d}")
        near["v_head_dim"] = (d,)
    for name in ("bias", "qkv_bias", "qk_norm"):
        if getattr(m, name):
            wrong.append(f"{name} = true, must be false")
            near[name] = (False,)
    if m.qkv_clip is not None:
        wrong.append(f"qkv_clip = {m.qkv_clip:g}, must be unset")
        near["qkv_clip"] = (None,)
    if not m.latent or not wrong:
        return None
    whole: dict[str, Sequence[Value]] = {"kv_lora_rank": (None,)} if len(wrong) > 2 else {}  # it does not belong there
    return violation(f"kv_lora_rank = {m.kv_lora_rank} with {'; '.join(wrong)}", **whole, **near)


@rule("ep etp tp cp dp dp_shard")
def experts_fill_a_stage(a: Arguments) -> RuleViolation | None:
    """The ranks of a pipeline stage are a whole number of copies of its experts."""
    p, dp = a.parallel, a.parallel.dp or 1
    copies, stage = max(1, dp // (p.dp_shard or dp)), p.tp * p.cp * dp
    edp, rest = divmod(stage, p.ep * p.etp)
    ep = (1,) if stage % p.etp else divisors(stage // p.etp, p.ep)
    if rest:
        problem = f"tp*cp*dp % (ep*etp) = {stage} % ({p.ep}*{p.etp}) = {rest}, must be 0"
        return violation(problem, ep=ep, etp=divisors(stage, p.etp), dp=multiples(dp, p.ep * p.etp))
    if edp % copies:
        shards = [shard for shard in divisors(dp, p.dp_shard or dp) if edp % (dp // shard) == 0]
        problem = f"edp % (dp/dp_shard) = {edp} % {copies} = {edp % copies}, must be 0"
        return violation(problem, ep=ep, dp_shard=shards, etp=divisors(p.etp, p.etp))
    return None


experts_divide_by_ep = require("Each rank of ep holds the same number of experts.", divisible("experts", "ep"))
experts_divide_by_etp = require("Each rank of etp holds the same share of each expert.", divisible("expert_ffn", "etp"))
shared_expert_divides_by_tp = require(
    "Each rank of tp holds the same share of the shared expert.", divisible("shared_ffn", "tp")
)


@rule("experts top_k router_groups router_top_groups router_group_score")
def router_can_choose(a: Arguments) -> RuleViolation | None:
    """There are as many experts as each token goes to, in the groups that are chosen from."""
    m, n, groups = a.model, a.model.experts, a.model.router_groups
    if not n:
        return None
    if n % groups:  # the groups are what to mend first
        problem = f"{told('{experts % router_groups}', a)} = {n % groups}, must be 0"
        return violation(problem, router_groups=divisors(n, groups), experts=multiples(n, groups))
    if m.router_top_groups > groups:
        problem = told("{router_top_groups}, must be <= {router_groups}", a)
        return violation(problem, router_top_groups=(groups,))
    if groups > 1 and m.router_group_score == "top2" and n // groups < 2:
        problem = told("{router_group_score} with {experts / router_groups} = 1 expert in a group", a)
        return violation(problem, router_group_score=("max",))
    most = n // groups * (m.router_top_groups if groups > 1 else 1)
    if m.top_k <= most:
        return None
    of = f"experts = {n}" if groups == 1 else f"experts / router_groups * router_top_groups = {most}"
    return violation(f"top_k = {m.top_k}, must be <= {of}", top_k=(most,))


@rule("first_dense sparse_every dense_layers layers experts")
def some_layer_is_sparse(a: Arguments) -> RuleViolation | None:
    """A model with experts has them in one layer at least."""
    m = a.model
    if not m.experts or any(map(m.is_sparse, range(m.layers))):
        return None
    others = ", {dense_layers}" if m.dense_layers else ""
    problem = told(f"{{first_dense}}{others} and {{sparse_every}} leave no layer of {m.layers} to {{experts}}", a)
    return violation(problem, first_dense=(0,), sparse_every=(1,), dense_layers=((),), experts=(0,))


@rule("experts expert_ffn shared_ffn fp8 etp tp")
def fp8_experts_divide(a: Arguments) -> RuleViolation | None:
    """Gemms of experts in fp8 have sizes that are multiples of 16 on each rank."""
    m, p = a.model, a.parallel
    sizes = (("expert_ffn", "etp", m.dim_expert, p.etp), ("shared_ffn", "tp", m.shared_ffn, p.tp))
    wrong = [each for each in sizes if (size := each[2]) % (ranks := each[3]) == 0 and size // ranks % ROW]
    if not m.experts or a.run.fp8 == "none" or not wrong:
        return None
    said = ", ".join(f"{name}/{axis} = {size}/{ranks} = {size // ranks}" for name, axis, size, ranks in wrong)
    near: dict[str, Sequence[Value]] = {name: multiples(size, ROW * ranks) for name, _, size, ranks in wrong}
    return violation(f"{said}: must be a multiple of {ROW} for fp8", **near, fp8=("none",))


@rule("ep_comm_overlap ep etp micro_batch recompute fp8 experts")
def a_microbatch_has_halves(a: Arguments) -> RuleViolation | None:
    """Halves that go through the blocks together are as large, and are not recomputed one by one."""
    p, n, how = a.parallel, a.batch.micro_batch, a.run.recompute
    near: dict[str, Sequence[Value]]
    if not p.ep_comm_overlap or not a.model.experts or p.ep * p.etp == 1:
        return None
    if n % 2:
        problem, near = f"micro_batch = {n}: micro_batch % 2 = 1, must be 0", {"micro_batch": (n + 1, n - 1)[:n]}
    elif a.run.fp8 == "tensorwise":
        problem, near = "fp8 = tensorwise: one scale of a microbatch would be two", {"fp8": ("rowwise", "none")}
    elif how in ("block", "offload"):
        problem = f"recompute = {how}: a block that is recomputed has nothing beside it"
        near = {"recompute": ("selective", "none")}
    else:
        return None
    return violation(f"ep_comm_overlap with {problem}", **near, ep_comm_overlap=(False,))
