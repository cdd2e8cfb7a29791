"""What goes with an update that is proven later."""

from __future__ import annotations

from stretto.arguments.rule import RuleViolation, rule
from stretto.arguments.schema import Arguments


@rule("optimizer.post_validate", "parallel.sharding", "run.fp8")
def updates_can_be_taken_back(a: Arguments) -> RuleViolation | None:
    """An update can be taken back where gradients are whole, and a step can be run again."""
    if not a.optimizer.post_validate or (a.parallel.sharding in ("none", "zero1") and a.run.fp8 == "none"):
        return None
    sharded = a.parallel.sharding not in ("none", "zero1")
    path, others = ("parallel.sharding", ("zero1", "none")) if sharded else ("run.fp8", ("none",))
    why = f"sharding = {a.parallel.sharding}" if sharded else f"fp8 = {a.run.fp8}"
    return RuleViolation(f"post_validate, but {why}", {path: others, "optimizer.post_validate": (False,)})
