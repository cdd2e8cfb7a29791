"""Capacity: how many tokens of one document an expert takes at most, and which are dropped.

The limit is on a document, not on what a rank or a microbatch happens to hold, so it drops the same assignments in
every layout: c s K / E of the s K assignments of its s tokens, rounded up. A plain row is one document; of a row of
several each has a limit of its own, so that none is dropped for what another chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.arguments.schema import ModelConfig
from stretto.collectives import all_gather_async
from stretto.experts.tokens import gathered, mine
from stretto.structure import Structure
from stretto.tensor_parallel import Build


def within_capacity(
    experts: Tensor,
    weights: Tensor,
    sequence: tuple[int, int],
    config: ModelConfig,
    build: Build,
    structure: Structure | None = None,
) -> Tensor:
    """Which assignments [n, K] are kept; `sequence` are the tokens of each sample here, or under no sequence
    parallelism everywhere on the ranks of tp, and the samples, which stand as `structure` says (None: plain rows)."""
    b, k, tp, cp = sequence[1], config.top_k, build.tp, build.cp
    here = _of_all(torch.cat([experts.to(weights.dtype), weights], -1), sequence, build)
    rows = all_gather_async(here, cp).wait() if cp.size > 1 else here
    rows = rows.view(-1, b, 2 * k)  # [slots of all ranks of cp, b, 2K]
    if structure is None or structure.plain:
        order, document, size = None, rows.new_zeros((1, 1)), rows.new_full((1, 1), len(rows))
    else:
        order = structure.order(tuple(range(cp.size)), rows.device)[..., None].expand(-1, b, 1)
        document, size = structure.documents(rows.device)
        rows = rows.gather(0, order.expand(-1, -1, 2 * k))
    chosen, importance = rows.chunk(2, -1)
    limit = torch.ceil(config.expert_capacity * size.double() * k / config.experts)[..., None]
    which = document[..., None].long() * config.experts + chosen.long()  # an expert, of a document
    kept = _first(which, limit.expand_as(which), importance if config.expert_drop == "lowest" else None)
    if order is not None:
        kept = torch.empty_like(kept).scatter_(0, order.expand(-1, -1, k), kept)
    kept = kept.reshape(cp.size, -1, k)[cp.rank]
    if tp.size == 1:
        return kept
    if build.sequence_parallel:
        return kept[tp.rank * len(experts) : (tp.rank + 1) * len(experts)]
    return kept[mine(len(kept), tp)]


def _of_all(packed: Tensor, sequence: tuple[int, int], build: Build) -> Tensor:
    """[slots * b, 2K] of all ranks of tp."""
    tp = build.tp
    if tp.size == 1:
        return packed
    if build.sequence_parallel:
        return all_gather_async(packed, tp).wait()
    return gathered(packed, tp, sequence[0] * sequence[1])


def _first(which: Tensor, limit: Tensor, importance: Tensor | None) -> Tensor:
    """[s, b, K]: is an assignment among the first `limit` of those whose `which` is the same? They come in the order of
    tokens, or the most important first."""
    s, b, k = which.shape
    which, limit = (each.transpose(0, 1).reshape(b, s * k) for each in (which, limit))
    turn = torch.arange(s * k, device=which.device).expand(b, -1)
    if importance is not None:
        leading = _leading(importance.transpose(0, 1).reshape(b, s * k))
        turn = torch.sort(leading, dim=-1, descending=True, stable=True).indices
    alike, by = torch.sort(which.gather(1, turn), dim=-1, stable=True)
    turn = turn.gather(1, by)
    before = torch.arange(s * k, device=which.device) - torch.searchsorted(alike, alike)
    kept = torch.empty_like(which, dtype=torch.bool).scatter_(1, turn, before < limit.gather(1, turn))
    return kept.view(b, s, k).transpose(0, 1)


def _leading(weights: Tensor) -> Tensor:
    """The leading bits of weights: 24 of fp64, 16 of fp32, so that those which rounding alone tells apart are equal.

    The first tokens of a sequence, if they are the same word, attend to equal values and get equal weights; which of
    them is larger would be for the order of a sum to say, and so for the layout. Equal ones go by their position.
    """
    if weights.dtype == torch.float64:
        return weights.float()
    return (weights.contiguous().view(torch.int32) & -(2**8)).view(torch.float32)
