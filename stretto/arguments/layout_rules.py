"""Rules over layout, process groups, schedule and batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from stretto.arguments.nearby import by_distance, divisors, even_split, multiples, sizes
from stretto.arguments.rule import RuleViolation, clash, divisible, require, rule, told, violation
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, paths, put
from stretto.layout import DEFAULT_ORDER, Layout
from stretto.layout.schedules import FAMILIES
from stretto.notation.profile import ProfileWindow


@rule("nproc tp cp pp dp")
def layout_fits_world(a: Arguments) -> RuleViolation | None:
    """The axes of parallelism use every process exactly once."""
    p, world = a.parallel, a.run.nproc or 1
    model, near = p.tp * p.cp * p.pp, {"tp": divisors(world, p.tp), "pp": divisors(world, p.pp)}
    if p.dp is None:
        problem = f"{told('{nproc % (tp*cp*pp)}', a)} = {world % model}, must be 0"
        return violation(problem, nproc=multiples(world, model), **near)
    if model * p.dp == world:
        return None
    problem = f"{told('{tp*cp*pp*dp}', a)} = {model * p.dp}, must be nproc = {world}"
    dp = (world // model,) if world % model == 0 else ()
    return violation(problem, nproc=(model * p.dp,), dp=dp, **near)


hidden_divides_into_heads = require(
    "Unless head_dim is given, the heads share the hidden size equally.",
    divisible("hidden", "heads", "head_dim is None"),
)


@rule("head_dim hidden heads position")
def rotary_pairs(a: Arguments) -> RuleViolation | None:
    """Rotary positions turn the dimensions of a head in pairs."""
    d, heads = a.model.head_dim, divisors(a.model.hidden, a.model.heads)
    if d is None or a.model.position != "rope" or d % 2 == 0:
        return None
    problem = f"head_dim % 2 = {d} % 2 = 1, must be 0 for rotary positions"
    return violation(problem, head_dim=sizes(d, 2), heads=heads, position=("learned",))


kv_heads_divide_heads = require(
    "Each key/value head serves the same number of query heads.", divisible("heads", "kv_heads")
)
heads_divide_by_tp = require(
    "Each tensor-parallel rank computes the same number of query heads.", divisible("heads", "tp")
)
ffn_divides_by_tp = require(
    "Each tensor-parallel rank holds the same share of the feed-forward block.", divisible("ffn", "tp")
)
copies_are_whole = require(
    "Data-parallel ranks are a whole number of copies of what is sharded.", divisible("dp", "dp_shard")
)


@rule("kv_heads tp")
def kv_heads_fit_tp(a: Arguments) -> RuleViolation | None:
    """Key/value heads are split evenly over the tensor-parallel ranks, or each is held by as many of them."""
    kv, tp = a.model.num_kv_heads, a.parallel.tp
    if kv % tp == 0 or tp % kv == 0:
        return None
    return violation(
        f"kv_heads = {kv}, tp = {tp}: one must be a multiple of the other",
        kv_heads=by_distance(kv, (*multiples(kv, tp), *divisors(tp, kv))),
        tp=by_distance(tp, (*divisors(kv, tp), *multiples(tp, kv))),
    )


sequence_divides_by_tp = require(
    "Under sequence parallelism each tensor-parallel rank holds an equal piece of the sequence.",
    divisible("seq_len", "tp", "sequence_parallel", sequence_parallel=[False]),
)


@rule("global_batch micro_batch dp")
def batch_divides(a: Arguments) -> RuleViolation | None:
    """Each replica computes the same whole number of microbatches in a step."""
    b, dp = a.batch, a.parallel.dp
    if dp is None or (rest := b.global_batch % (share := b.micro_batch * dp)) == 0:
        return None
    return violation(
        f"{told('{global_batch % (micro_batch*dp)}', a)} = {rest}, must be 0",
        global_batch=multiples(b.global_batch, share),
        micro_batch=() if b.global_batch % dp else divisors(b.global_batch // dp, b.micro_batch),
    )


@rule("vpp schedule")
def schedule_has_so_many_stages(a: Arguments) -> RuleViolation | None:
    """A schedule fits the number of stages on a rank."""
    p, made = a.parallel, FAMILIES[a.parallel.schedule]
    if made.any_stages or p.stages_per_rank == made.stages:
        return None
    others = ("interleaved", *(name for name, other in FAMILIES.items() if other.any_stages or other.stages == p.vpp))
    problem = f"vpp = {p.vpp}, but {p.schedule} has {made.stages} stage{'s' * (made.stages > 1)} on a rank"
    return violation(problem, vpp=(made.stages,), schedule=others)


@rule("vpp_shape vpp schedule")
def schedule_has_this_shape(a: Arguments) -> RuleViolation | None:
    """The stages of a rank lie as the schedule has them."""
    p, made, vpp = a.parallel, FAMILIES[a.parallel.schedule], a.parallel.stages_per_rank
    if p.vpp_shape is None or p.vpp_shape in (shapes := made.shapes(vpp)):
        return None
    others = tuple(name for name, other in FAMILIES.items() if p.vpp_shape in other.shapes(vpp))
    problem = f"vpp_shape = {p.vpp_shape}, but {p.schedule} with vpp = {vpp} has {' or '.join(shapes)}"
    return violation(problem, vpp_shape=shapes, schedule=others, vpp=(made.stages,))


@rule("stage_layers pp vpp layers")
def stage_layers_place_every_layer(a: Arguments) -> RuleViolation | None:
    """An explicit split names every pipeline stage and places every layer once, in halves at most."""
    p, layers = a.parallel, a.model.layers
    counts, stages, vpp = p.stage_layers, p.num_stages, p.stages_per_rank
    parts = [count for count in counts or () if (2 * count) % 1]
    if counts is None or (len(counts) == stages and sum(counts) == layers and not parts):
        return None
    must = f"pp = {stages}" if vpp == 1 else f"pp*vpp = {p.pp}*{vpp} = {stages}"
    total = sum(counts)
    wrong = [f"stage_layers has {len(counts)} entries, must be {must}"] * (len(counts) != stages)
    wrong += [f"stage_layers sums to {total:g}, must be layers = {layers}"] * (total != layers)
    wrong += [f"stage_layers has {each:g}: layers come whole or in halves" for each in parts[:1]]
    pp = () if len(counts) % vpp else (len(counts) // vpp,)
    as_many = () if total % 1 else (int(total),)
    return violation("; ".join(wrong), stage_layers=even_split(layers, stages), layers=as_many, pp=pp)


@rule("stage_layers parallel_residual pp vpp layers")
def parallel_residual_is_not_cut(a: Arguments) -> RuleViolation | None:
    """Where attention and feed-forward both read what enters a layer, both are on one stage."""
    counts, layers = a.parallel.stage_layers, a.model.layers
    if counts is None or not a.model.parallel_residual or not any(count % 1 for count in counts):
        return None
    said = ",".join(f"{count:g}" for count in counts)
    problem = f"stage_layers = {said} cuts a layer, but both sublayers of a parallel_residual have one input"
    return violation(problem, stage_layers=even_split(layers, a.parallel.num_stages), parallel_residual=(False,))


evaluation_has_data = require(
    "Evaluation needs held-out text, or validation sets.",
    clash(
        "{eval_every} with {held_out}: no text to evaluate on",
        "held_out == 0 and not eval_data",
        held_out=[0.05],
        eval_every=[0],
    ),
)


@rule("profile steps")
def profile_is_a_window(a: Arguments) -> RuleViolation | None:
    """The steps to profile are a range within the run."""
    if a.run.profile is None:
        return None
    try:
        window = ProfileWindow.read(a.run.profile)
    except ValueError as error:
        return violation(str(error), profile=("steps=10:13",))
    if window.steps.start <= a.run.steps:
        return None
    problem = f"profile = {a.run.profile} begins after the last step, {a.run.steps}"
    return violation(problem, steps=(window.steps.stop,))


@rule("order tp cp pp dp ep etp")
def order_has_every_axis(a: Arguments) -> RuleViolation | None:
    """The order names each axis of more than one rank once, and no other word."""
    p = a.parallel
    try:
        Layout.of(tp=p.tp, cp=p.cp, pp=p.pp, dp=p.dp or 1, ep=p.ep, etp=p.etp, order=p.order)
    except ValueError as error:  # which may have more to say of ep
        wrong = [line for line in str(error).splitlines() if line.startswith("order")]
        return violation("; ".join(wrong), order=(DEFAULT_ORDER,)) if wrong else None
    return None


_PER_AXIS = "timeouts gloo high_priority min_ctas max_ctas"


@rule(f"{_PER_AXIS} tp cp pp dp")
def groups_have_peers(a: Arguments) -> RuleViolation | None:
    """What is said of the groups of an axis has no effect where the axis has one rank."""
    alone: set[str] = set()
    nearby: dict[str, Sequence[Value]] = {}
    for name in _PER_AXIS.split():
        said, kept = _of_axes(a, name)
        if len(kept) < len(said):
            alone |= {entry if isinstance(entry, str) else entry[0] for entry in said if entry not in kept}
            nearby[name] = (kept,)
    sizes = ", ".join(f"{axis} = 1" for axis in sorted(alone))
    return violation(f"{sizes}: there are no groups", **nearby) if alone else None


def with_peers(a: Arguments) -> Arguments:
    """The same run, where nothing is said of the groups of an axis of one rank."""
    for name in _PER_AXIS.split():
        a = put(a, paths()[name], _of_axes(a, name)[1])
    return a


def _of_axes(a: Arguments, name: str) -> tuple[Any, Any]:
    """What a setting says of axes, and what of it is of axes of several ranks."""
    said: Any = get(a, paths()[name])
    return said, tuple(entry for entry in said if _size(a, entry if isinstance(entry, str) else entry[0]) > 1)


def _size(a: Arguments, axis: str) -> int:
    """Ranks along an axis, as in dp or dp-cp; a middle stage has no peer on `embed`, the first and the last have."""
    if axis == "embed":
        return min(2, a.parallel.pp)
    return prod(getattr(a.parallel, name) or 1 for name in axis.split("-"))


@rule("gloo high_priority min_ctas max_ctas")
def gloo_is_not_nccl(a: Arguments) -> RuleViolation | None:
    """What is said of NCCL has no effect on the groups of an axis that run over Gloo."""
    both = {*a.nccl.high_priority, *dict(a.nccl.min_ctas), *dict(a.nccl.max_ctas)} & {*a.groups.gloo}
    kept = tuple(axis for axis in a.groups.gloo if axis not in both)
    problem = f"{', '.join(sorted(both))}: options of NCCL have no effect on Gloo"
    return violation(problem, gloo=(kept,)) if both else None


@rule("min_ctas max_ctas")
def thread_blocks_have_a_range(a: Arguments) -> RuleViolation | None:
    """A group has at least as many thread blocks at most as at least."""
    most = dict(a.nccl.max_ctas)
    wrong = {axis: least for axis, least in a.nccl.min_ctas if least > most.get(axis, least)}
    raised = tuple((axis, wrong.get(axis, limit)) for axis, limit in a.nccl.max_ctas)
    said = ", ".join(f"{axis}: min_ctas = {least}, must be <= max_ctas = {most[axis]}" for axis, least in wrong.items())
    return violation(said, max_ctas=(raised,)) if wrong else None
