"""Which tokens go to which ranks: each once, however many of a rank's experts it chose.

A rank makes the rows of its experts of the tokens that came: with two ranks and eight experts of each token that is a
quarter of what rows would be. Outputs come back one by one, since their sum is in the order of the slots for every ep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.world import ExpertAxes


@dataclass(frozen=True, eq=False)
class Crossing:
    """Tokens by the rank that they go to, within one in their order.

    `order` [n * min(K, ep) * etp, which is as many as may go]: t * ranks + rank of each that goes, and zeros behind.
    `back` [1, n, ranks]: where in that order each is; beyond the last where it does not go. `number` [ranks]: how many
    go to each. `place` [n * K]: of each assignment, where its token is among those of its holder; int32.
    """

    order: Tensor
    back: Tensor
    number: Tensor
    place: Tensor

    @classmethod
    def of(cls, holders: Tensor, axes: ExpertAxes) -> Crossing:
        """`holders` [n, K]: the coordinate on ep of each assignment's expert; the size of that axis where it was
        dropped."""
        (n, k), ep, ranks = holders.shape, axes.ep.size, len(axes.places)
        goes = holders.new_zeros((n, ep + 1), dtype=torch.bool).scatter_(1, holders, True).t()[:ep].contiguous()
        of_ranks = [at for at, _ in axes.places]
        if axes.etp.size > 1:  # the same ones to each part of a cut expert
            goes = torch.stack([goes[at] for at in of_ranks])
        # Flat: along any other dimension torch's scan of so few columns takes a hundred times as long.
        found = goes.flatten().cumsum(0).view(ranks, n) - 1
        number = goes.sum(1)
        places = found - (number.cumsum(0) - number)[:, None]
        if axes.etp.size > 1:
            places = torch.stack([places[of_ranks.index(at)] for at in range(ep)])
        place = places.gather(0, holders.t().clamp(max=ep - 1)).t().to(torch.int32).flatten()
        most = n * min(k, ep) * axes.etp.size
        back = torch.where(goes, found, most).t().contiguous()
        numbers = torch.arange(n * ranks, device=back.device)
        order = numbers.new_zeros(most + 1).scatter_(0, back.flatten(), numbers)[:most]
        return cls(order, back[None], number, place)
