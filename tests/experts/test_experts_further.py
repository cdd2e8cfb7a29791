"""Layers that predict further tokens, in layouts: gradients, updates and loss are those of one process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from experts_models import LATENT, QWEN2, arguments, layout_of, prove

from stretto.arguments.schema import Arguments, DataConfig, TuningConfig
from stretto.batch import Batch
from stretto.testing import Pool
from stretto.verify import build
from stretto.verify.session import random_batch
from stretto.world import World

SP = {"sequence_parallel": True}
CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({**LATENT, "mtp_layers": 2}, {"tp": 2, "pp": 2, "ep": 2, **SP}, {"recompute": "selective"}),
    (
        {**QWEN2, "tied": True, "mtp_layers": 1},
        {"pp": 2, "vpp": 2, "schedule": "zbv", "dp": 2, "sharding": "zero1"},
        {},
    ),
    ({**LATENT, "mtp_layers": 1}, {"cp": 2, "dp": 2, "ep": 2, "sharding": "fsdp"}, {"recompute": "block"}),
    ({"experts": 0, "expert_ffn": None, "mtp_layers": 2, "scale_embedding": True}, {"cp": 2, "pp": 2}, {}),
]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("model", "parallel", "run"),
    [pytest.param(*c, id=" ".join(c[1]), marks=[pytest.mark.nightly] * (c in CASES[1:3])) for c in CASES],
)
def test_a_layout_equals_one_process(
    pool: Pool, model: dict[str, Any], parallel: dict[str, Any], run: dict[str, Any]
) -> None:
    """Catches labels shifted after the sequence was cut; an embedding whose gradient is that of one end; routers behind
    the last layer that are not balanced; a join that tensor-parallel ranks do not add up."""
    args = arguments(model, run=run, **parallel)
    prove(pool, replace(args, data=replace(DataConfig(), packing="cp" in parallel)))


ADAPTED = TuningConfig(lora_rank=3, lora_targets=("q", "v", "o", "down"), lora_dropout=0.3)
ENDS = TuningConfig(freeze=("model.embed_tokens.*", "model.norm.*"))
BLOCKS = TuningConfig(freeze=("model.layers.[0-3].*",))


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("tuning", "model", "parallel"),
    [
        pytest.param(ADAPTED, {}, {"tp": 2, "pp": 2, **SP}, id="adapters"),
        pytest.param(ENDS, {"tied": True}, {"pp": 2, "dp": 2, "vpp": 2, "schedule": "zbv"}, id="ends"),
        pytest.param(BLOCKS, {}, {"tp": 2, "dp": 2, "sharding": "fsdp"}, id="blocks", marks=pytest.mark.nightly),
    ],
)
def test_what_is_trained_in_part_equals_one_process(
    pool: Pool, tuning: TuningConfig, model: dict[str, Any], parallel: dict[str, Any]
) -> None:
    """Catches a use of a frozen embedding that is waited for, and adapters behind the last layer that are not."""
    dense = {"experts": 0, "expert_ffn": None, "mtp_layers": 2, **model}
    prove(pool, replace(arguments(dense, **parallel), tuning=tuning))


@pytest.mark.gloo
def test_losses_of_further_tokens_are_those_of_one_process(pool: Pool) -> None:
    """And not far from those of a model that knows nothing. Catches: losses that carry their weight or the share of
    their tokens, that add up over steps, or that tensor-parallel ranks count once each."""
    dense = {"experts": 0, "expert_ffn": None, "mtp_layers": 2, "mtp_loss": 0.7}
    want = pool.run(1, _told, arguments(dense))[0]
    for parallel in ({"tp": 2, "pp": 2, "dp": 2}, {"cp": 2, "pp": 2, "vpp": 2, "schedule": "zbv", "vpp_shape": "v"}):
        for found in pool.run(4 if "cp" in parallel else 8, _told, arguments(dense, **parallel)):
            assert found == [pytest.approx(step, rel=1e-10) for step in want]
    assert all(abs(loss - math.log(53)) < 0.1 for step in want for loss in step)


def _told(world: World, args: Arguments) -> list[list[float]]:
    found = []
    with build(args, layout_of(args), world) as session:
        for step in range(2):
            microbatches = session.microbatches(random_batch(args, step))
            sums, shares = session.built.stepper.step(microbatches, 0.1).further.tolist()
            found.append([loss / share for loss, share in zip(sums, shares, strict=True)])
            assert max(shares) < 1
    return found


@pytest.mark.gloo
def test_further_labels_stay_in_row_and_document() -> None:
    """Catches a label of the next document, one beyond the end of the row, and a mask of the wrong place."""
    tokens = torch.arange(6)[None]
    mask = torch.tensor([[True, True, False, True, False, True]])
    starts = torch.tensor([[0, 0, 0, 3, 3, 3]])
    batch = Batch(tokens, tokens + 1, mask, starts=starts).with_further(2)
    assert batch.further is not None
    assert batch.further.tolist() == [[[2, ~3, ~4, ~5, 6, ~0], [~3, ~4, ~5, 6, ~0, ~0]]]
    assert batch.rows(slice(0, 1)).further is not None
    plain = Batch(tokens, tokens + 1, mask).with_further(1)
    assert plain.further is not None
    assert plain.further.tolist() == [[[2, ~3, 4, ~5, 6, ~0]]]
