"""The best experts of each token in one kernel, of which each program has some tokens and all of their scores.

Torch's finds the K-th score digit by digit and sorts what is above it: of scores that fit into registers K maxima are
quicker. Of equal scores the first expert is the better.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches

_SCORES = 2048
"""Of a program."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _best(scores, out, tokens, experts, k: tl.constexpr, rows: tl.constexpr, wide: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    expert = tl.arange(0, wide)
    here = token[:, None] < tokens
    left = tl.load(scores + token[:, None] * experts + expert, mask=here & (expert < experts), other=-float("inf"))
    for slot in tl.static_range(k):
        found = tl.argmax(left, 1, tie_break_left=True)
        # Of scores that are no numbers some expert is taken, but one of those that there are.
        tl.store(out + token * k + slot, tl.minimum(found, experts - 1).to(tl.int64), mask=token < tokens)
        left = tl.where(expert == found[:, None], -float("inf"), left)


def best(scores: Tensor, k: int) -> Tensor:
    """`stretto.experts.router.best`."""
    scores, (tokens, experts) = scores.contiguous(), scores.shape
    out = torch.empty((tokens, k), dtype=torch.int64, device=scores.device)
    wide = triton.next_power_of_2(experts)
    rows = max(1, _SCORES // wide)
    if tokens:
        _best[(triton.cdiv(tokens, rows),)](scores, out, tokens, experts, k, rows, wide, num_warps=4)
    return out
