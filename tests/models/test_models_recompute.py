"""Parts of a block that the backward computes once more: no bit of a gradient changes, and what is kept is what the
ledger says, to the byte.

Faults to catch: a part that is kept although it is computed once more; a ledger that forgets LSEs; sinks without a
gradient where attention is computed once more; a budget that is exceeded; layers recomputed that need not be.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stretto.arguments import ConfigError
from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig, RunConfig
from stretto.batch import Batch
from stretto.distributed import MainGradients
from stretto.estimate.kept import BLOCK, NOTHING, Parts, kept, seconds
from stretto.estimate.memo import Memo
from stretto.estimate.recompute import PARTS, _working, activations, policy_of
from stretto.estimate.stages import stage_blocks
from stretto.models import Microbatch, StageSpec, Transformer
from stretto.schedule.blocks import StageBlock, Sublayers
from stretto.tensor_parallel import Build
from stretto.testing.live_storage import LiveStorage
from stretto.world import Axis

pytestmark = pytest.mark.gloo

SEQ, ROWS = 32, 2
MODEL = ModelConfig(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=53, dropout=0.2)
OTHERS: list[dict[str, Any]] = [
    {},
    {"norm": "layer", "bias": True, "activation": "gelu", "position": "learned", "qk_norm": True},
    {"norm_placement": "both"},
    {"norm_placement": "post", "position": "learned"},
]
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "rope_head_dim": 4, "q_lora_rank": 8, "kv_heads": 4}
LOW: dict[str, Any] = {**LATENT, "q_lora_rank": None}
SINKS: dict[str, Any] = {"attention_sinks": True, "window": 8}
EVERY: list[Parts] = [*(frozenset(c) for c in chain(*(combinations(PARTS, n) for n in range(5)))), BLOCK]


def run(config: ModelConfig, policy: dict[int, Parts], only: StageBlock | None = None) -> tuple[list[Tensor], int]:
    """Output and gradients of the layers, and the bytes that they keep: of one block alone where `only` is given."""
    sums = _Sums()
    build = Build(Axis.single("tp"), False, torch.float32, accumulators=sums)
    blocks = (only,) if only is not None else tuple(map(StageBlock, range(config.layers)))
    model = Transformer(config, StageSpec(blocks, first=False, last=False), build, seq_len=SEQ, recompute=policy)
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2, generator=generator)
    tokens = torch.randint(53, (ROWS, SEQ + 1), generator=generator)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(ROWS, SEQ, dtype=torch.bool), torch.arange(ROWS))
    microbatch = Microbatch(batch, torch.tensor(64.0))
    x = torch.randn(SEQ, ROWS, config.hidden, generator=generator).requires_grad_()
    model(x, microbatch)  # angles are made once
    with LiveStorage() as live:
        y = model(x, microbatch)
    made = live.nbytes
    y.backward(torch.randn(y.shape, generator=generator))
    grads = [g for p in model.parameters() if (g := sums.totals.get(p, p.grad)) is not None]
    assert x.grad is not None
    assert len(grads) == len(list(model.parameters()))
    return [y.detach(), x.grad, *grads], made


class _Sums(MainGradients):
    """Accumulators that keep each sum."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: dict[Tensor, Tensor] = {}

    def add(self, weight: Any, write: Any) -> None:
        first = weight not in self.totals
        with torch.no_grad():
            write(self.totals.setdefault(weight, torch.empty_like(weight)), first)

    defer = add

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: ",".join(other) or "llama")
def test_no_bit_changes_and_the_ledger_says_what_is_kept(other: dict[str, Any]) -> None:
    config = replace(MODEL, **other)
    wanted, _ = run(config, {})
    quiet = replace(config, dropout=0.0)
    args = Arguments(model=quiet, batch=BatchConfig(seq_len=SEQ, micro_batch=ROWS, global_batch=ROWS))
    entering = SEQ * ROWS * config.hidden * 4
    for parts in EVERY if not other else EVERY[1::4]:
        found, _ = run(config, {1: parts})
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), parts
        for block in (StageBlock(0, sublayers) for sublayers in Sublayers):
            _, made = run(quiet, {0: parts}, only=block)
            # What enters stands outside, what leaves enters the next one.
            said = kept(args, block, parts)
            assert made == said.total, (block, parts, made / entering, said)


def test_sinks_have_the_same_gradient() -> None:
    config = replace(MODEL, **SINKS)
    wanted, _ = run(config, {})
    for parts in ({"attention"}, {"attention", "projections"}):
        found, _ = run(config, {0: frozenset(parts)})
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), parts


@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([64, 256]),
    st.sampled_from([1, 2, 4]),
    st.floats(0.0, 1.1),
    st.booleans(),
)
@example(1, 3, 256, 1, 0.625, True)
@settings(deadline=None, max_examples=30)
def test_a_budget_is_kept_by_the_cheapest_choice(
    layers: int, pp: int, seq_len: int, tp: int, share: float, windowed: bool
) -> None:
    """Between what all blocks need that are recomputed and what none does: within it, and no layer for nothing."""
    layers = max(layers, pp)
    model = replace(MODEL, layers=layers, dropout=0.0, window=8 if windowed else None, global_layers=(0,) * windowed)
    args = Arguments(
        model=model,
        parallel=ParallelConfig(tp=tp, pp=pp, dp=1, sequence_parallel=tp > 1),
        batch=BatchConfig(seq_len=seq_len, micro_batch=2, global_batch=8),
    )
    for stage in range(pp):
        n = len(policy_of(args, stage))
        most, least = (activations(args, stage, (parts,) * n) for parts in (NOTHING, BLOCK))
        budget = int(least + share * (most - least))
        within = replace(args, run=RunConfig(activation_budget=f"{budget}"))
        policy = policy_of(within, stage)
        assert activations(args, stage, policy) <= max(budget, least)
        assert any(policy) == (budget < most)
        for place, (layer, parts) in enumerate(zip(stage_blocks(args)[stage], policy, strict=True)):
            for quicker in EVERY:
                if seconds(args, layer, quicker) < seconds(args, layer, parts):
                    assert activations(args, stage, (*policy[:place], quicker, *policy[place + 1 :])) > budget


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("other", [*OTHERS[:2], LATENT, LOW], ids=["llama", "gpt", "latents", "low"])
def test_what_lives_is_within_a_budget(other: dict[str, Any], share: float) -> None:
    """Storages of a real forward of four layers, to the byte. Attention over latents keeps more on a CPU than on a GPU,
    where it is not computed once more."""
    config = replace(MODEL, layers=4, dropout=0.0, **other)
    batch = BatchConfig(seq_len=SEQ, micro_batch=ROWS, global_batch=ROWS)
    args = Arguments(model=config, batch=batch, parallel=ParallelConfig(dp=1))
    most, least = (activations(args, 0, (parts,) * 4) for parts in (NOTHING, BLOCK))
    budget = int(least + share * (most - least))
    policy = policy_of(replace(args, run=RunConfig(activation_budget=f"{budget}")), 0)
    made, entering = run(config, dict(enumerate(policy)))[1], SEQ * ROWS * config.hidden * 4
    again = max(_working(args, StageBlock(layer), parts, False, Memo()) for layer, parts in enumerate(policy))
    beside = sum(parts.isdisjoint({"attention", "block"}) for parts in policy) * 31 * 4 * SEQ * ROWS * 4
    assert made + entering + again - beside * config.latent == activations(args, 0, policy) <= budget


def test_a_budget_that_cannot_be_kept_says_the_numbers() -> None:
    args = Arguments(model=MODEL, run=RunConfig(activation_budget="1KB"), parallel=ParallelConfig(dp=1))
    with pytest.raises(
        ConfigError, match=r"activation_budget = 1KB, but stage 0 needs [\d,]+ bytes for 1 microbatch of"
    ):
        policy_of(args, 0)


def test_so_many_layers_of_each_stage() -> None:
    args = Arguments(
        model=replace(MODEL, layers=5),
        parallel=ParallelConfig(pp=2, dp=1, stage_layers=(3, 2)),
        run=RunConfig(recompute="selective", recompute_parts=("attention",), recompute_layers=2),
    )
    some = frozenset({"attention"})
    assert policy_of(args, 0) == (some, some, NOTHING)
    assert policy_of(args, 1) == (some, some)
