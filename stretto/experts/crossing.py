"""Which tokens go to which other ranks: each once, however many of a rank's experts it chose.

A rank makes the rows of its experts of the tokens that came: with two ranks and eight experts of each token that is a
quarter of what rows would be. Outputs come back one by one, since their sum is in the order of the slots for every ep.
What a rank's own experts take of its own tokens goes nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.world import ExpertAxes


@dataclass(frozen=True, eq=False)
class Crossing:
    """Tokens by the rank that they go to, within one in their order.

    `tokens` [n * min(K * etp, ranks - 1), which is as many as may go]: which go, by rank, and zeros behind. `number`
    [ranks]: how many go to each; none to this one. `place` [n * K]: of each assignment, where its token is among those
    that go to its holder, int32; of this rank's own it says nothing.
    """

    tokens: Tensor
    number: Tensor
    place: Tensor

    @classmethod
    def of(cls, holders: Tensor, axes: ExpertAxes) -> Crossing:
        """`holders` [n, K]: the coordinate on ep of each assignment's expert; the size of that axis where it was
        dropped."""
        (n, k), ep, ranks, me = holders.shape, axes.ep.size, len(axes.places), axes.exchange.rank
        chosen = holders.new_zeros((n, ep + 1), dtype=torch.bool).scatter_(1, holders, True).t()
        goes = torch.stack([chosen[at] for at, _ in axes.places])  # the same ones to each part of a cut expert
        goes[me].zero_()
        # Flat: along any other dimension torch's scan of so few columns takes a hundred times as long.
        found = goes.flatten().cumsum(0).view(ranks, n) - 1
        number = goes.sum(1)
        places = found - (number.cumsum(0) - number)[:, None]
        elsewhere = {at: rank for rank, (at, _) in enumerate(axes.places) if rank != me}
        of_ep = torch.stack([places[elsewhere.get(at, me)] for at in range(ep)])
        place = of_ep.gather(0, holders.t().clamp(max=ep - 1)).t().to(torch.int32).flatten()
        most = n * min(k * axes.etp.size, ranks - 1)
        each = torch.arange(n, device=holders.device)
        tokens = each.new_zeros(most + 1)
        tokens.scatter_(0, torch.where(goes, found, most).flatten(), each.repeat(ranks))
        return cls(tokens[:most], number, place)
