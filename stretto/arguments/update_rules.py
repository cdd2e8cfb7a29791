"""What goes together in the update of the weights: its rule, its rate, its groups, when it is proven."""

from __future__ import annotations

from stretto.arguments.rule import RuleViolation, clash, ordered, require, rule, told, violation
from stretto.arguments.schema import Arguments
from stretto.notation.param_groups import parse_groups

updates_can_be_taken_back = require(
    "An update can be taken back where gradients are whole, and a step can be run again.",
    clash("post_validate, but {sharding}", sharding=["zero1", "none"], post_validate=[False]),
    clash("post_validate, but {fp8}", fp8=["none"], post_validate=[False]),
    # the balance of experts moves with each run of a step
    clash("post_validate, but {experts}", "experts", post_validate=[False]),
    # what is asked of the gradients before the update
    clash("post_validate, but {on_nonfinite}", on_nonfinite=["stop"], post_validate=[False]),
    # the copies that it needs would lie on the device
    clash("post_validate, but optimizer_cpu_offload", optimizer_cpu_offload=[False], post_validate=[False]),
    clash("post_validate, but {masters}", masters=["fp32"], post_validate=[False]),
)
rate_decays = require(
    "The learning rate does not decay to more than its peak.",
    ordered(
        "min_lr <= lr",
        "lr_schedule != 'constant'",
        min_lr="lr / 10",
        lr="min_lr",
    ),
)


@rule("param_groups")
def groups_are_readable(a: Arguments) -> RuleViolation | None:
    """Parameter groups are patterns over names, each with a weight decay, a learning-rate multiplier, or both."""
    try:
        parse_groups(a.optimizer.param_groups)
    except ValueError as error:
        return violation(f"param_groups: {error}", param_groups=("*norm*:weight_decay=0",))
    return None


@rule("moments optimizer beta1 beta2 momentum")
def moments_move(a: Arguments) -> RuleViolation | None:
    """A moment in bf16 decays by more than its rounding in a step: otherwise it would stay where it is."""
    o = a.optimizer
    used = {"adamw": "beta1 beta2", "lion": "beta2", "sgd": "momentum", "muon": "beta1 beta2 momentum"}[o.optimizer]
    slow = [name for name in used.split() if 1 - getattr(o, name) < 2**-7]
    if o.moments != "bf16" or not slow:
        return None
    said = told(", ".join(f"{{{name}}}" for name in slow), a)
    problem = f"moments = bf16, {said}: 1 - {slow[0]} must be >= 2^-7 = 0.0078, the rounding of bf16"
    return violation(problem, moments=("fp32",), **({slow[0]: (0.95,)} if len(slow) == 1 else {}))


masters_have_a_remainder = require(
    "Of weights in bf16 alone 16 bits make fp32 masters; wider weights are their own masters.",
    clash("{masters}, {dtype}, must be bf16", masters=["fp32"], dtype=["bf16"]),
)
gradients_travel_as_computed = require(
    "Gradients travel in bf16 only where they come from GEMMs in bf16.",
    clash("{reduce_dtype}, {dtype}: gradients would lose digits that they have", reduce_dtype=["fp32"], dtype=["bf16"]),
)


@rule("warmup_steps decay_steps steps")
def warmup_ends_before_decay(a: Arguments) -> RuleViolation | None:
    """The warm-up is over before the decay is."""
    warmup, end = a.optimizer.warmup_steps, a.optimizer.decay_steps or a.run.steps
    sooner, later = tuple(dict.fromkeys((end // 10, 0))), (warmup + 1,)
    problem = f"warmup_steps = {warmup}, must be < decay_steps = {end}"
    return violation(problem, warmup_steps=sooner, decay_steps=later, steps=later) if warmup >= end else None


cooldown_fits = require(
    "Warm-up and cooldown of the wsd schedule do not overlap.",
    ordered(
        "warmup_steps + cooldown_steps <= decay_steps",
        "lr_schedule == 'wsd'",
        cooldown_steps="decay_steps - warmup_steps",
        warmup_steps="decay_steps - cooldown_steps",
        decay_steps="warmup_steps + cooldown_steps",
    ),
)
