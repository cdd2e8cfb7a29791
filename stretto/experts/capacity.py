"""Capacity: how many tokens of one sequence an expert takes at most, and which are dropped.

The limit is on a sequence, not on what a rank or a microbatch happens to hold, so it drops the same assignments in
every layout: c s K / E of the s K assignments of a sequence, rounded up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stretto.arguments.schema import ModelConfig
from stretto.collectives import all_gather_async
from stretto.experts.tokens import gathered, mine
from stretto.tensor_parallel import Build


def within_capacity(
    experts: Tensor, weights: Tensor, sequence: tuple[int, int], config: ModelConfig, build: Build
) -> Tensor:
    """Which assignments [n, K] are kept; `sequence` are the tokens of each sample here, or under no sequence
    parallelism everywhere, and the samples."""
    s, b = sequence
    tp, k = build.tp, config.top_k
    packed = torch.cat([experts.to(weights.dtype), weights], -1)
    if tp.size == 1:
        whole = packed
    elif build.sequence_parallel:
        whole = all_gather_async(packed, tp).wait()
    else:
        whole = gathered(packed, tp, s * b)
    s = len(whole) // b
    chosen, importance = whole.view(s, b, 2 * k).transpose(0, 1).chunk(2, -1)  # [b, s, K]
    limit = math.ceil(config.expert_capacity * s * k / config.experts)
    flat = chosen.reshape(b, s * k).long()
    if config.expert_drop == "last":
        order = torch.arange(s * k, device=flat.device).expand(b, -1)
    else:
        order = torch.sort(_leading(importance.reshape(b, s * k)), dim=-1, descending=True, stable=True).indices
    ranked = flat.gather(1, order)
    before = torch.nn.functional.one_hot(ranked, config.experts).cumsum(1).gather(2, ranked[..., None]).squeeze(-1)
    kept = torch.empty_like(flat, dtype=torch.bool).scatter_(1, order, before <= limit)
    rows = kept.view(b, s, k).transpose(0, 1).reshape(s * b, k)
    if tp.size == 1:
        return rows
    if build.sequence_parallel:
        return rows[tp.rank * len(experts) : (tp.rank + 1) * len(experts)]
    return rows[mine(s * b, tp)]


def _leading(weights: Tensor) -> Tensor:
    """The leading bits of weights: 24 of fp64, 16 of fp32, so that those which rounding alone tells apart are equal.

    The first tokens of a sequence, if they are the same word, attend to equal values and get equal weights; which of
    them is larger would be for the order of a sum to say, and so for the layout. Equal ones go by their position.
    """
    if weights.dtype == torch.float64:
        return weights.float()
    return (weights.contiguous().view(torch.int32) & -(2**8)).view(torch.float32)
