"""What goes together in the update of the weights: its rule, its rate, its groups, when it is proven."""

from __future__ import annotations

from stretto.arguments.param_groups import parse_groups
from stretto.arguments.rule import RuleViolation, rule
from stretto.arguments.schema import Arguments


@rule(
    *("optimizer.post_validate", "parallel.sharding", "run.fp8", "model.experts", "run.on_nonfinite"),
    *("optimizer.optimizer_cpu_offload", "optimizer.masters"),
)
def updates_can_be_taken_back(a: Arguments) -> RuleViolation | None:
    """An update can be taken back where gradients are whole, and a step can be run again."""
    if not a.optimizer.post_validate:
        return None
    if a.parallel.sharding not in ("none", "zero1"):
        said = f"post_validate, but sharding = {a.parallel.sharding}"
        return RuleViolation(said, {"parallel.sharding": ("zero1", "none"), "optimizer.post_validate": (False,)})
    if a.run.fp8 != "none":
        return RuleViolation(
            f"post_validate, but fp8 = {a.run.fp8}", {"run.fp8": ("none",), "optimizer.post_validate": (False,)}
        )
    if a.model.experts:  # their balance moves with each run of a step
        return RuleViolation(f"post_validate, but experts = {a.model.experts}", {"optimizer.post_validate": (False,)})
    if a.run.on_nonfinite != "stop":  # which is asked of the gradients before the update
        return RuleViolation(
            f"post_validate, but on_nonfinite = {a.run.on_nonfinite}",
            {"run.on_nonfinite": ("stop",), "optimizer.post_validate": (False,)},
        )
    if a.optimizer.optimizer_cpu_offload:  # the copies that it needs would lie on the device
        return RuleViolation(
            "post_validate, but optimizer_cpu_offload",
            {"optimizer.optimizer_cpu_offload": (False,), "optimizer.post_validate": (False,)},
        )
    if a.optimizer.masters != "fp32":
        return RuleViolation(
            f"post_validate, but masters = {a.optimizer.masters}",
            {"optimizer.masters": ("fp32",), "optimizer.post_validate": (False,)},
        )
    return None


@rule("optimizer.min_lr", "optimizer.lr", "optimizer.lr_schedule")
def rate_decays(a: Arguments) -> RuleViolation | None:
    """The learning rate does not decay to more than its peak."""
    o = a.optimizer
    if o.lr_schedule == "constant" or o.min_lr <= o.lr:
        return None
    return RuleViolation(
        f"min_lr = {o.min_lr:g}, must be <= lr = {o.lr:g}",
        {"optimizer.min_lr": (float(f"{o.lr / 10:g}"),), "optimizer.lr": (o.min_lr,)},
    )


@rule("optimizer.param_groups")
def groups_are_readable(a: Arguments) -> RuleViolation | None:
    """Parameter groups are patterns over names, each with a weight decay, a learning-rate multiplier, or both."""
    try:
        parse_groups(a.optimizer.param_groups)
    except ValueError as error:
        return RuleViolation(f"param_groups: {error}", {"optimizer.param_groups": ("*norm*:weight_decay=0",)})
    return None


@rule("optimizer.moments", "optimizer.optimizer", "optimizer.beta1", "optimizer.beta2", "optimizer.momentum")
def moments_move(a: Arguments) -> RuleViolation | None:
    """A moment in bf16 decays by more than its rounding in a step: otherwise it would stay where it is."""
    o = a.optimizer
    used = {
        "adamw": ("beta1", "beta2"),
        "lion": ("beta2",),
        "sgd": ("momentum",),
        "muon": ("beta1", "beta2", "momentum"),
    }[o.optimizer]
    slow = [name for name in used if 1 - getattr(o, name) < 2**-7]
    if o.moments != "bf16" or not slow:
        return None
    said = ", ".join(f"{name} = {getattr(o, name):g}" for name in slow)
    return RuleViolation(
        f"moments = bf16, {said}: 1 - {slow[0]} must be >= 2^-7 = 0.0078, the rounding of bf16",
        {"optimizer.moments": ("fp32",), **({f"optimizer.{slow[0]}": (0.95,)} if len(slow) == 1 else {})},
    )


@rule("optimizer.masters", "run.dtype")
def masters_have_a_remainder(a: Arguments) -> RuleViolation | None:
    """Of weights in bf16 alone 16 bits make fp32 masters; wider weights are their own masters."""
    if a.optimizer.masters == "fp32" or a.run.dtype == "bf16":
        return None
    return RuleViolation(
        f"masters = {a.optimizer.masters}, dtype = {a.run.dtype}, must be bf16",
        {"optimizer.masters": ("fp32",), "run.dtype": ("bf16",)},
    )


@rule("parallel.reduce_dtype", "run.dtype")
def gradients_travel_as_computed(a: Arguments) -> RuleViolation | None:
    """Gradients travel in bf16 only where they come from GEMMs in bf16."""
    if a.parallel.reduce_dtype != "bf16" or a.run.dtype == "bf16":
        return None
    return RuleViolation(
        f"reduce_dtype = bf16, dtype = {a.run.dtype}: gradients would lose digits that they have",
        {"parallel.reduce_dtype": ("fp32",), "run.dtype": ("bf16",)},
    )


@rule("optimizer.warmup_steps", "optimizer.decay_steps", "run.steps")
def warmup_ends_before_decay(a: Arguments) -> RuleViolation | None:
    """The warm-up is over before the decay is."""
    warmup, end = a.optimizer.warmup_steps, a.optimizer.decay_steps or a.run.steps
    if warmup < end:
        return None
    return RuleViolation(
        f"warmup_steps = {warmup}, must be < decay_steps = {end}",
        {
            "optimizer.warmup_steps": tuple(dict.fromkeys((end // 10, 0))),
            "optimizer.decay_steps": (warmup + 1,),
            "run.steps": (warmup + 1,),
        },
    )


@rule("optimizer.cooldown_steps", "optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.lr_schedule")
def cooldown_fits(a: Arguments) -> RuleViolation | None:
    """Warm-up and cooldown of the wsd schedule do not overlap."""
    o, end = a.optimizer, a.optimizer.decay_steps or a.run.steps
    if o.lr_schedule != "wsd" or o.cooldown_steps is None or o.warmup_steps + o.cooldown_steps <= end:
        return None
    return RuleViolation(
        f"warmup_steps + cooldown_steps = {o.warmup_steps} + {o.cooldown_steps} = "
        f"{o.warmup_steps + o.cooldown_steps}, must be <= decay_steps = {end}",
        {
            "optimizer.cooldown_steps": (end - o.warmup_steps,) if end > o.warmup_steps else (),
            "optimizer.warmup_steps": (end - o.cooldown_steps,) if end >= o.cooldown_steps else (),
            "optimizer.decay_steps": (o.warmup_steps + o.cooldown_steps,),
        },
    )
