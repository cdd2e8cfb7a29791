"""Whether the microbatches of a run can be CUDA graphs: the same launches each time, and none waits for the host."""

from __future__ import annotations

from stretto.arguments.rule import RuleViolation, rule
from stretto.arguments.schema import Arguments

READS = (
    *("run.device", "run.recompute", "run.on_nonfinite", "run.check_finite", "run.check_collectives", "parallel.exact"),
    *("parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp", "parallel.schedule", "parallel.sharding"),
    *("batch.global_batch", "batch.micro_batch", "data.packing", "model.experts"),
)


def without_graphs(a: Arguments) -> str:
    """Why not, with the number; empty where they can be."""
    p, r = a.parallel, a.run
    microbatches = a.batch.microbatches(p.dp)
    reasons = {
        f"device = {r.device} has none": r.device != "cuda",
        f"exact = {p.exact}: kernels must be chosen alike for every tp": p.exact is not None,
        f"pp = {p.pp}: stages wait for each other": p.pp > 1,
        f"tp = {p.tp}: its collectives are not recorded": p.tp > 1,
        f"cp = {p.cp}: its collectives are not recorded": p.cp > 1,
        f"schedule = {p.schedule}: backwards do not follow their forwards": p.schedule != "1f1b",
        f"sharding = {p.sharding}: gradients have no address of their own": p.sharding in ("zero2", "fsdp"),
        f"dp = {p.dp} with one microbatch, whose backward sends gradients": (p.dp or 1) > 1 and microbatches == 1,
        "packing: documents differ from one microbatch to the next": a.data.packing,
        f"experts = {a.model.experts}: tokens go where the router says": bool(a.model.experts),
        "recompute = offload: the host's memory takes part": r.recompute == "offload",
        f"on_nonfinite = {r.on_nonfinite} looks at each microbatch": r.on_nonfinite != "stop",
        "check_finite looks at each microbatch": r.check_finite,
        "check_collectives waits for the host": r.check_collectives,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@rule("run.cuda_graphs", *READS)
def graphs_can_be_recorded(a: Arguments) -> RuleViolation | None:
    """CUDA graphs are of microbatches whose launches are the same each time, and that meet no other rank."""
    reason = without_graphs(a) if a.run.cuda_graphs else ""
    return RuleViolation(f"cuda_graphs = true, but {reason}", {"run.cuda_graphs": (False,)}) if reason else None
