"""Which ranks and parameters a step left without numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stretto.distributed.watch import first_microbatch
from stretto.exchange import all_gather_json
from stretto.layout.ranks import named
from stretto.train.step import StepResult
from stretto.world import Axis

NAMED = 3


def not_finite(result: StepResult, world: Axis) -> str:
    """In words: ranks whose own loss is not finite, and parameters whose summed gradient is not; and where gradients
    are watched, in which microbatch of which rank it was so first.

    All ranks of `world` call it together; it reads the device.
    """
    names, norms = result.norms
    own = sorted({name for name, norm in zip(names, norms.tolist(), strict=True) if not math.isfinite(norm)})
    found = all_gather_json([math.isfinite(result.own_loss.item()), own, first_microbatch(result.seen)], world)
    ranks = [world.ranks[n] for n, (fine, *_) in enumerate(found) if not fine]
    wrong = sorted({name for _, each, _ in found for name in each})
    first = [(seen[0], world.ranks[n], seen[1]) for n, (*_, seen) in enumerate(found) if seen is not None]
    said = [f"not finite: the loss of {named(ranks, NAMED)}"] * bool(ranks)
    said += [f"the gradient{'s' * (len(wrong) > 1)} of {_some(wrong)}" + ("" if ranks else " not finite")] * bool(wrong)
    first = [each for each in sorted(first) if each[0] == min(first)[0]]
    said += [f"first in microbatch {n} of rank {rank}: {_some(names)}" for n, rank, names in first[:NAMED]]
    return ", ".join(said)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
