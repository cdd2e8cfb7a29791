"""Inputs of blocks that wait in the host's memory: the same bits as a recomputation, and no memory in between.

Faults to catch: an input that keeps its memory; one that comes back as zeros; the last block, whose input stays, not
asking for the one before.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stretto.arguments.schema import ModelConfig
from stretto.batch import Batch
from stretto.estimate.kept import BLOCK
from stretto.models import Microbatch, StageSpec, Transformer
from stretto.models.block import Block
from stretto.tensor_parallel import Build
from stretto.world import Axis

pytestmark = pytest.mark.gloo

CONFIG = ModelConfig(layers=4, hidden=16, heads=4, kv_heads=2, head_dim=4, ffn=24, vocab=53, dropout=0.2)


def _run(*, offload: bool) -> tuple[list[torch.Tensor], list[int]]:
    """Loss and gradients of two microbatches whose forwards come first, and bytes of the blocks' inputs in between."""
    build = Build(Axis("tp", 0, (0,)), False, torch.float32)
    model = Transformer(
        CONFIG, StageSpec.whole(CONFIG), build, seq_len=8, recompute=dict.fromkeys(range(4), BLOCK), offload=offload
    )
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, std=0.2, generator=generator)
    inputs: list[torch.Tensor] = []

    def seen(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0])

    hooks = [m.register_forward_pre_hook(seen) for m in model.modules() if isinstance(m, Block)]
    losses = []
    for n in range(2):
        tokens = torch.randint(53, (2, 9), generator=generator)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 8, dtype=torch.bool), torch.arange(2) + 2 * n)
        losses.append(model(None, Microbatch(batch, torch.tensor(32.0))))
    sizes = [x.untyped_storage().nbytes() for x in inputs]
    for hook in hooks:
        hook.remove()
    for loss in losses:
        loss.backward()
    return [*losses, *(p.grad for p in model.parameters() if p.grad is not None)], sizes


def test_bits_are_those_of_a_recomputation_and_memory_is_gone_in_between() -> None:
    (plain, kept), (away, left) = _run(offload=False), _run(offload=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, away, strict=True))
    whole = 8 * 2 * 16 * 4
    assert kept == [whole] * 8
    assert left == [0, 0, 0, whole] * 2, "the last block's backward comes next: its input stays"


def test_while_a_block_goes_back_the_input_of_the_one_before_comes() -> None:
    model = Transformer(
        CONFIG,
        StageSpec.whole(CONFIG),
        Build(Axis("tp", 0, (0,)), False, torch.float32),
        seq_len=8,
        recompute=dict.fromkeys(range(4), BLOCK),
        offload=True,
    )
    inputs: list[torch.Tensor] = []
    here: list[list[bool]] = []

    def seen(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(inputs) < 4:
            inputs.append(args[0])
        else:
            here.append([x.untyped_storage().nbytes() > 0 for x in inputs])

    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(seen)
    tokens = torch.zeros((2, 9), dtype=torch.int64)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 8, dtype=torch.bool), torch.arange(2))
    model(None, Microbatch(batch, torch.tensor(16.0))).backward()
    assert [sum(each[:n]) for each, n in zip(here, (3, 2, 1, 0), strict=True)] == [1, 1, 1, 0]
    assert [each[n] for each, n in zip(here, (2, 1, 0), strict=False)] == [True] * 3
