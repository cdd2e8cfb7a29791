"""What goes with an update that is proven later."""

from __future__ import annotations

from stretto.arguments.rule import RuleViolation, rule
from stretto.arguments.schema import Arguments


@rule("optimizer.post_validate", "parallel.sharding", "run.fp8", "model.experts")
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
    return None
