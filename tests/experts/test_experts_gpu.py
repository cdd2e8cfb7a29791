"""Experts over two GPUs, as a run has them there: kernels of rows and of weight gradients, NCCL or copy engines.

What `test_experts_layouts` and `test_peer_buffer_layouts` hold, where a kernel, a stream or a copy engine makes it.
"""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from experts_models import DEEPSEEK, MIXTRAL, arguments, layout_of

from stretto import peer_buffer
from stretto.arguments.schema import Arguments
from stretto.testing import Pool
from stretto.verify import Comparison, against_reference
from stretto.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")]

WIDE: dict[str, Any] = {"hidden": 128, "head_dim": 32, "expert_ffn": 128}
"""Whole tiles of the kernel of weight gradients."""


def compared(world: World, args: Arguments) -> Comparison:
    with mock.patch.object(peer_buffer, "LEAST", 1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler looks for gradients of what has none
        return against_reference(args, layout_of(args), world, steps=2)


@pytest.mark.parametrize("engines", [False, True], ids=["nccl", "copy engines"])
@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        pytest.param(MIXTRAL, {"ep": 2}, id="ep"),
        pytest.param(MIXTRAL, {"etp": 2}, id="etp"),
        pytest.param({**MIXTRAL, "expert_capacity": 0.75}, {"ep": 2}, id="capacity"),
        pytest.param({**MIXTRAL, "expert_capacity": 0.75}, {"etp": 2}, id="etp, capacity"),
        pytest.param(MIXTRAL, {"ep": 2, "ep_comm_overlap": True}, id="halves"),
        pytest.param({**MIXTRAL, "expert_capacity": 0.75}, {"ep": 2, "ep_comm_overlap": True}, id="halves, capacity"),
        pytest.param(DEEPSEEK, {"ep": 2}, id="shared expert"),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_experts_over_two_gpus_equal_one_process(
    gpus: Pool, dtype: str, model: dict[str, Any], parallel: dict[str, Any], engines: bool
) -> None:
    run = {"device": "cuda", "compile": True}
    args = arguments({**WIDE, **model}, dtype=dtype, run=run, dp=2, ep_copy_engines=engines, **parallel)
    for rank, found in enumerate(gpus.run(2, compared, args, timeout=240.0)):
        assert not found.unequal, f"rank {rank}: replicas differ: {found.unequal}"
        assert not found.failures, f"rank {rank}: {[f'{d.name}: {d.error:.1e}' for d in found.failures[:8]]}"
