"""Products of experts in fp8 on a GPU."""

from __future__ import annotations

import pytest
import torch

from stretto.experts.fp8 import GroupedFp8
from stretto.experts.segments import Segments
from stretto.world import Axis

ROWS = (5, 0, 9)


@pytest.mark.gpu
def test_a_gpu_multiplies_the_same_numbers() -> None:
    """By one grouped product, forward and back, with an expert that has no rows."""
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(1)
        fp8 = GroupedFp8(Axis.single("etp"), len(ROWS))
        w = torch.nn.Parameter(torch.randn(len(ROWS) * 64, 128, generator=generator).bfloat16().to(device))
        x, dy = (torch.randn(sum(ROWS), n, generator=generator).bfloat16().to(device) for n in (128, 64))
        rows = Segments(lambda: [list(ROWS)], torch.tensor(ROWS, device=device).cumsum(0).to(torch.int32))
        found.append([fp8.times(x, w, rows, column=True).cpu(), fp8.back(dy, w, rows, column=True).cpu()])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2**-7, atol=0.05)
