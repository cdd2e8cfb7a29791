"""Rules over layout, batch and schedule; one small pure function for each, here and in the files named *_rules."""

from __future__ import annotations

from stretto.arguments.nearby import by_distance, divisors, even_split, multiples, sizes
from stretto.arguments.pipeline import num_stages, vpp_of
from stretto.arguments.profile import ProfileWindow
from stretto.arguments.rule import Nearby, RuleViolation, divides, divisible, rule
from stretto.arguments.schema import Arguments
from stretto.layout.schedules import FAMILIES


@rule("run.nproc", "parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp")
def layout_fits_world(a: Arguments) -> RuleViolation | None:
    """The axes of parallelism use every process exactly once."""
    p, world = a.parallel, a.run.nproc or 1
    model, nearby = p.tp * p.cp * p.pp, Nearby()
    if p.dp is None:
        nearby["run.nproc"] = multiples(world, model)
        problem = f"nproc % (tp*cp*pp) = {world} % ({p.tp}*{p.cp}*{p.pp}) = {world % model}, must be 0"
    else:
        if model * p.dp == world:
            return None
        nearby["run.nproc"] = (model * p.dp,)
        nearby["parallel.dp"] = (world // model,) if world % model == 0 else ()
        problem = f"tp*cp*pp*dp = {p.tp}*{p.cp}*{p.pp}*{p.dp} = {model * p.dp}, must be nproc = {world}"
    for name in ("tp", "pp"):
        size = getattr(p, name)
        nearby[f"parallel.{name}"] = divisors(world, size)
    return RuleViolation(problem, nearby)


@rule("model.hidden", "model.heads", "model.head_dim")
def hidden_divides_into_heads(a: Arguments) -> RuleViolation | None:
    """Unless head_dim is given, the heads share the hidden size equally."""
    if a.model.head_dim is not None:
        return None
    return divides("model.hidden", a.model.hidden, "model.heads", a.model.heads)


@rule("model.head_dim", "model.hidden", "model.heads", "model.position")
def rotary_pairs(a: Arguments) -> RuleViolation | None:
    """Rotary positions turn the dimensions of a head in pairs."""
    d = a.model.head_dim
    if d is None or a.model.position != "rope" or d % 2 == 0:
        return None
    heads = divisors(a.model.hidden, a.model.heads)
    nearby: Nearby = {"model.head_dim": sizes(d, 2), "model.heads": heads, "model.position": ("learned",)}
    return RuleViolation(f"head_dim % 2 = {d} % 2 = 1, must be 0 for rotary positions", nearby)


kv_heads_divide_heads = divisible(
    "model.heads", "model.kv_heads", "Each key/value head serves the same number of query heads."
)
heads_divide_by_tp = divisible(
    "model.heads", "parallel.tp", "Each tensor-parallel rank computes the same number of query heads."
)
ffn_divides_by_tp = divisible(
    "model.ffn", "parallel.tp", "Each tensor-parallel rank holds the same share of the feed-forward block."
)
copies_are_whole = divisible(
    "parallel.dp", "parallel.dp_shard", "Data-parallel ranks are a whole number of copies of what is sharded."
)


@rule("model.kv_heads", "parallel.tp")
def kv_heads_fit_tp(a: Arguments) -> RuleViolation | None:
    """Key/value heads are split evenly over the tensor-parallel ranks, or each is held by as many of them."""
    kv, tp = a.model.num_kv_heads, a.parallel.tp
    if kv % tp == 0 or tp % kv == 0:
        return None
    return RuleViolation(
        f"kv_heads = {kv}, tp = {tp}: one must be a multiple of the other",
        {
            "model.kv_heads": by_distance(kv, (*multiples(kv, tp), *divisors(tp, kv))),
            "parallel.tp": by_distance(tp, (*divisors(kv, tp), *multiples(tp, kv))),
        },
    )


@rule("batch.seq_len", "parallel.tp", "parallel.sequence_parallel")
def sequence_divides_by_tp(a: Arguments) -> RuleViolation | None:
    """Under sequence parallelism each tensor-parallel rank holds an equal piece of the sequence."""
    if not a.parallel.sequence_parallel:
        return None
    violation = divides("batch.seq_len", a.batch.seq_len, "parallel.tp", a.parallel.tp)
    return violation and RuleViolation(violation.problem, {**violation.nearby, "parallel.sequence_parallel": (False,)})


@rule("batch.global_batch", "batch.micro_batch", "parallel.dp")
def batch_divides(a: Arguments) -> RuleViolation | None:
    """Each replica computes the same whole number of microbatches in a step."""
    b, dp = a.batch, a.parallel.dp
    if dp is None:
        return None
    share = b.micro_batch * dp
    if b.global_batch % share == 0:
        return None
    nearby: Nearby = {"batch.global_batch": multiples(b.global_batch, share)}
    if b.global_batch % dp == 0:
        nearby["batch.micro_batch"] = divisors(b.global_batch // dp, b.micro_batch)
    return RuleViolation(
        f"global_batch % (micro_batch*dp) = {b.global_batch} % ({b.micro_batch}*{dp}) = {b.global_batch % share}, "
        "must be 0",
        nearby,
    )


@rule("parallel.vpp", "parallel.schedule")
def schedule_has_so_many_stages(a: Arguments) -> RuleViolation | None:
    """A schedule fits the number of stages on a rank."""
    p = a.parallel
    made = FAMILIES[p.schedule]
    if made.any_stages or vpp_of(p) == made.stages:
        return None
    others = ("interleaved", *(name for name, other in FAMILIES.items() if other.any_stages or other.stages == p.vpp))
    return RuleViolation(
        f"vpp = {p.vpp}, but {p.schedule} has {made.stages} stage{'s' * (made.stages > 1)} on a rank",
        {"parallel.vpp": (made.stages,), "parallel.schedule": others},
    )


@rule("parallel.vpp_shape", "parallel.vpp", "parallel.schedule")
def schedule_has_this_shape(a: Arguments) -> RuleViolation | None:
    """The stages of a rank lie as the schedule has them."""
    p, made = a.parallel, FAMILIES[a.parallel.schedule]
    shapes = made.shapes(vpp_of(p))
    if p.vpp_shape is None or p.vpp_shape in shapes:
        return None
    others = tuple(name for name, other in FAMILIES.items() if p.vpp_shape in other.shapes(vpp_of(p)))
    return RuleViolation(
        f"vpp_shape = {p.vpp_shape}, but {p.schedule} with vpp = {vpp_of(p)} has {' or '.join(shapes)}",
        {"parallel.vpp_shape": shapes, "parallel.schedule": others, "parallel.vpp": (made.stages,)},
    )


@rule("parallel.stage_layers", "parallel.pp", "parallel.vpp", "model.layers")
def stage_layers_place_every_layer(a: Arguments) -> RuleViolation | None:
    """An explicit split names every pipeline stage and places every layer once."""
    counts, stages, layers = a.parallel.stage_layers, num_stages(a.parallel), a.model.layers
    if counts is None:
        return None
    wrong = []
    if len(counts) != stages:
        vpp = vpp_of(a.parallel)
        sizes = f"pp = {stages}" if vpp == 1 else f"pp*vpp = {a.parallel.pp}*{vpp} = {stages}"
        wrong.append(f"stage_layers has {len(counts)} entries, must be {sizes}")
    if sum(counts) != layers:
        wrong.append(f"stage_layers sums to {sum(counts)}, must be layers = {layers}")
    if not wrong:
        return None
    nearby: Nearby = {
        "parallel.stage_layers": even_split(layers, stages),
        "model.layers": (sum(counts),),
        **({} if len(counts) % vpp_of(a.parallel) else {"parallel.pp": (len(counts) // vpp_of(a.parallel),)}),
    }
    return RuleViolation("; ".join(wrong), nearby)


@rule("data.held_out", "data.eval_data", "run.eval_every")
def evaluation_has_data(a: Arguments) -> RuleViolation | None:
    """Evaluation needs held-out text, or validation sets."""
    if a.run.eval_every == 0 or a.data.held_out > 0 or a.data.eval_data:
        return None
    return RuleViolation(
        f"eval_every = {a.run.eval_every} with held_out = 0: no text to evaluate on",
        {"data.held_out": (0.05,), "run.eval_every": (0,)},
    )


@rule("run.profile", "run.steps")
def profile_is_a_window(a: Arguments) -> RuleViolation | None:
    """The steps to profile are a range within the run."""
    if a.run.profile is None:
        return None
    try:
        window = ProfileWindow.read(a.run.profile)
    except ValueError as error:
        return RuleViolation(str(error), {"run.profile": ("steps=10:13",)})
    if window.steps.start <= a.run.steps:
        return None
    return RuleViolation(
        f"profile = {a.run.profile} begins after the last step, {a.run.steps}", {"run.steps": (window.steps.stop,)}
    )
