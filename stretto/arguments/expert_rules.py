"""Rules over experts: their number, their router, and the ranks that they are spread over."""

from __future__ import annotations

from stretto.arguments.nearby import divisors, multiples
from stretto.arguments.precision_rules import ROW
from stretto.arguments.rule import Nearby, RuleViolation, divisible, rule
from stretto.arguments.schema import Arguments


@rule("parallel.ep", "parallel.etp", "model.experts")
def expert_axes_have_experts(a: Arguments) -> RuleViolation | None:
    """Expert axes spread experts, where the model has any."""
    large = {name: size for name in ("ep", "etp") if (size := getattr(a.parallel, name)) > 1}
    if a.model.experts or not large:
        return None
    said = ", ".join(f"{name} = {size}" for name, size in large.items())
    nearby: Nearby = {f"parallel.{name}": (1,) for name in large}
    return RuleViolation(f"{said} with experts = 0: nothing to spread", {**nearby, "model.experts": (8,)})


@rule("parallel.ep", "parallel.etp", "parallel.tp", "parallel.cp", "parallel.dp", "parallel.dp_shard")
def experts_fill_a_stage(a: Arguments) -> RuleViolation | None:
    """The ranks of a pipeline stage are a whole number of copies of its experts."""
    p = a.parallel
    dp, copies = p.dp or 1, (p.dp or 1) // (p.dp_shard or p.dp or 1)
    stage = p.tp * p.cp * dp
    if stage % (p.ep * p.etp) == 0 and stage // (p.ep * p.etp) % max(1, copies) == 0:
        return None
    nearby: Nearby = {"parallel.ep": divisors(stage // p.etp, p.ep) if stage % p.etp == 0 else (1,)}
    if stage % (p.ep * p.etp) == 0:
        edp = stage // (p.ep * p.etp)
        nearby["parallel.dp_shard"] = [shard for shard in divisors(dp, p.dp_shard or dp) if edp % (dp // shard) == 0]
        nearby["parallel.etp"] = divisors(p.etp, p.etp)
        return RuleViolation(f"edp % (dp/dp_shard) = {edp} % {copies} = {edp % copies}, must be 0", nearby)
    nearby["parallel.etp"] = divisors(stage, p.etp)
    nearby["parallel.dp"] = multiples(dp, p.ep * p.etp)
    return RuleViolation(
        f"tp*cp*dp % (ep*etp) = {stage} % ({p.ep}*{p.etp}) = {stage % (p.ep * p.etp)}, must be 0", nearby
    )


experts_divide_by_ep = divisible("model.experts", "parallel.ep", "Each rank of ep holds the same number of experts.")
experts_divide_by_etp = divisible(
    "model.expert_ffn", "parallel.etp", "Each rank of etp holds the same share of each expert."
)
shared_expert_divides_by_tp = divisible(
    "model.shared_ffn", "parallel.tp", "Each rank of tp holds the same share of the shared expert."
)


@rule("model.experts", "model.top_k", "model.router_groups", "model.router_top_groups", "model.router_group_score")
def router_can_choose(a: Arguments) -> RuleViolation | None:
    """There are as many experts as each token goes to, in the groups that are chosen from."""
    m = a.model
    n, groups = m.experts, m.router_groups
    if not n:
        return None
    if n % groups:  # the groups are what to mend first
        return RuleViolation(
            f"experts % router_groups = {n} % {groups} = {n % groups}, must be 0",
            {"model.router_groups": divisors(n, groups), "model.experts": multiples(n, groups)},
        )
    if m.router_top_groups > groups:
        return RuleViolation(
            f"router_top_groups = {m.router_top_groups}, must be <= router_groups = {groups}",
            {"model.router_top_groups": (groups,)},
        )
    if groups > 1 and m.router_group_score == "top2" and n // groups < 2:
        return RuleViolation(
            f"router_group_score = top2 with experts / router_groups = {n} / {groups} = 1 expert in a group",
            {"model.router_group_score": ("max",)},
        )
    most = n // groups * (m.router_top_groups if groups > 1 else 1)
    if m.top_k <= most:
        return None
    of = f"experts = {n}" if groups == 1 else f"experts / router_groups * router_top_groups = {most}"
    return RuleViolation(f"top_k = {m.top_k}, must be <= {of}", {"model.top_k": (most,)})


@rule("model.first_dense", "model.sparse_every", "model.layers", "model.experts")
def some_layer_is_sparse(a: Arguments) -> RuleViolation | None:
    """A model with experts has them in one layer at least."""
    m = a.model
    if not m.experts or any(map(m.is_sparse, range(m.layers))):
        return None
    return RuleViolation(
        f"first_dense = {m.first_dense} and sparse_every = {m.sparse_every} leave no layer of {m.layers} to "
        f"experts = {m.experts}",
        {"model.first_dense": (0,), "model.sparse_every": (1,), "model.experts": (0,)},
    )


@rule("model.experts", "model.expert_ffn", "model.shared_ffn", "run.fp8", "parallel.etp", "parallel.tp")
def fp8_experts_divide(a: Arguments) -> RuleViolation | None:
    """Gemms of experts in fp8 have sizes that are multiples of 16 on each rank."""
    if not a.model.experts or a.run.fp8 == "none":
        return None
    p = a.parallel
    sizes = (("expert_ffn/etp", a.model.dim_expert, p.etp), ("shared_ffn/tp", a.model.shared_ffn, p.tp))
    wrong = [(name, size, ranks) for name, size, ranks in sizes if size % ranks == 0 and size // ranks % ROW]
    if not wrong:
        return None
    said = ", ".join(f"{name} = {size}/{ranks} = {size // ranks}" for name, size, ranks in wrong)
    nearby: Nearby = {f"model.{name.partition('/')[0]}": multiples(size, ROW * ranks) for name, size, ranks in wrong}
    return RuleViolation(f"{said}: must be a multiple of {ROW} for fp8", {**nearby, "run.fp8": ("none",)})


@rule(
    *("parallel.ep_comm_overlap", "parallel.ep", "parallel.etp"),
    *("batch.micro_batch", "run.recompute", "run.fp8", "model.experts"),
)
def a_microbatch_has_halves(a: Arguments) -> RuleViolation | None:
    """Halves that go through the blocks together are as large, and are not computed once more one by one."""
    p, n = a.parallel, a.batch.micro_batch
    if not p.ep_comm_overlap or not a.model.experts or p.ep * p.etp == 1:
        return None
    if n % 2:
        return RuleViolation(
            f"ep_comm_overlap with micro_batch = {n}: micro_batch % 2 = {n % 2}, must be 0",
            {"batch.micro_batch": (n + 1, n - 1) if n > 1 else (2,), "parallel.ep_comm_overlap": (False,)},
        )
    if a.run.fp8 == "tensorwise":
        return RuleViolation(
            "ep_comm_overlap with fp8 = tensorwise: one scale of a microbatch would be two",
            {"run.fp8": ("rowwise", "none"), "parallel.ep_comm_overlap": (False,)},
        )
    if a.run.recompute not in ("block", "offload"):
        return None
    return RuleViolation(
        f"ep_comm_overlap with recompute = {a.run.recompute}: a block that is computed once more has nothing beside it",
        {"run.recompute": ("selective", "none"), "parallel.ep_comm_overlap": (False,)},
    )


@rule("model.expert_capacity", "parallel.cp")
def capacity_sees_whole_sequences(a: Arguments) -> RuleViolation | None:
    """What an expert takes of a sequence is counted where the sequence is whole."""
    if not a.model.expert_capacity or a.parallel.cp == 1:
        return None
    return RuleViolation(
        f"expert_capacity = {a.model.expert_capacity:g} with cp = {a.parallel.cp}: not available",
        {"model.expert_capacity": (0.0,), "parallel.cp": (1,)},
    )
