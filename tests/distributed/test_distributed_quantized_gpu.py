"""On GPUs, too, what is gathered in FP8 is what is gathered in bf16 and quantized, by NCCL and by copy engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stretto.arguments import parse
from stretto.distributed import Bucket, data_parallel
from stretto.testing import Pool
from stretto.verify import build, random_batch
from stretto.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")]

SIZES = "--hidden 256 --heads 4 --kv-heads 2 --ffn 512 --layers 3 --vocab 320 --seq-len 128 --micro-batch 2"
HOW = "--preset demo --tp 1 --pp 1 --nproc 2 --global-batch 8 --dtype bf16 --device cuda --fp8 tensorwise"


@pytest.mark.parametrize("words", ["", "--no-dp-copy-engines", "--no-compile", "--keep-units 1 --recompute block"])
def test_losses_and_weights_are_the_same_to_the_bit(gpus: Pool, words: str) -> None:
    wide, found = (gpus.run(2, _run, words, how, timeout=300.0) for how in (False, True))
    for one, other in zip(wide, found, strict=True):
        assert one[0] == other[0]
        assert not [name for name, tensor in one[1].items() if not torch.equal(tensor, other[1][name])]


def _run(world: World, words: str, in_fp8: bool) -> tuple[list[Any], dict[str, Tensor]]:
    args = parse(f"{HOW} {SIZES} --sharding fsdp --clip-grad 0 {words}".split(), env={}).args
    with pytest.MonkeyPatch.context() as patch:
        if not in_fp8:  # the same units, gathered as they are
            patch.setattr(data_parallel, "QuantizedBucket", lambda g, a, s, _, **options: Bucket(g, a, s, **options))
        with build(args, args.parallel.layout, world) as session:
            told = [session.step(random_batch(args, step)) for step in range(3)]
            return told, session.full_state()
