"""P1, P4, P5, P6, P11: experts in every layout give what one process gives: gradients, updates, balance.

Two steps: biases and balance losses of the second follow from the counts of the first.

Faults to catch: gradients of experts summed over all data-parallel ranks; a router whose gradient is not summed over
tensor-parallel ranks; a balance loss of the counts of one microbatch; tokens that every tensor-parallel rank sends;
parts of a cut expert that are not added up; a router that counts where it has a backward alone; slots without a token
that are counted; weights let go while a half of the microbatch still reads them; two halves that are announced as one
use; places of tokens that leave out what comes from ranks before; a capacity of what one rank of cp holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from experts_models import DEEPSEEK, GPT_OSS, LAST, LATENT, LATENT_V2, MIXTRAL, OSS, QWEN2, SMALL, arguments, prove

from stretto.arguments.schema import DataConfig, TuningConfig
from stretto.testing import Pool

pytestmark = pytest.mark.gloo

SP = {"sequence_parallel": True}
HALVES = {"ep_comm_overlap": True}
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
CASES: list[Case] = [
    (MIXTRAL, {"tp": 2, "dp": 2, "pp": 2, "ep": 2, "etp": 2, "sharding": "zero1"}, {"recompute": "block"}),
    (DEEPSEEK, {"tp": 2, "dp": 2, "ep": 4, **SP}, {"recompute": "selective"}),
    (OSS, {"dp": 4, "ep": 4, "pp": 2, "schedule": "zb-h1", "sharding": "fsdp"}, {}),
    (SMALL, {"tp": 3, "ep": 1, "etp": 1}, {}),
    ({**MIXTRAL, "dense_layers": (0, 2)}, {"dp": 4, "ep": 2, "sharding": "fsdp", **HALVES}, {}),
]
AT_NIGHT: list[Case] = [
    (LAST, {"tp": 2, "dp": 2, "ep": 4}, {"recompute": "block"}),
    (MIXTRAL, {"dp": 2, "ep": 2}, {}),
    (MIXTRAL, {"tp": 2, "dp": 2, "etp": 2, **SP}, {}),
    (DEEPSEEK, {"dp": 2, "pp": 2, "ep": 2, "schedule": "zbv", "vpp": 2}, {}),
    (QWEN2, {"tp": 2, "pp": 2, "ep": 2}, {}),
    (SMALL, {"tp": 2, "dp": 2, "ep": 2, **SP}, {}),
    (DEEPSEEK, {"dp": 4, "pp": 2, "ep": 2, "sharding": "fsdp"}, {}),
    (QWEN2, {"dp": 4, "ep": 2, "sharding": "zero2"}, {}),
    (OSS, {"tp": 4}, {}),
    (MIXTRAL, {"dp": 8, "ep": 2, "dp_shard": 4, "sharding": "fsdp"}, {}),
    (LATENT, {"tp": 2, "dp": 2, "ep": 2, "pp": 2, **SP}, {"recompute": "selective"}),
    (LATENT, {"tp": 4, "cp": 2, "ep": 2, "sharding": "zero1"}, {}),
    (LATENT_V2, {"tp": 2, "cp": 2, "cp_comm": ("ulysses",), **SP}, {"recompute": "block"}),
    (GPT_OSS, {"tp": 2, "dp": 2, "pp": 2, "etp": 2, "ep": 2, **SP}, {"recompute": "selective"}),
    (GPT_OSS, {"dp": 4, "ep": 2, "sharding": "fsdp"}, {}),
    (DEEPSEEK, {"tp": 2, "dp": 2, "ep": 4, **SP, **HALVES}, {"recompute": "selective"}),
    (MIXTRAL, {"tp": 2, "dp": 2, "pp": 2, "ep": 2, "etp": 2, "sharding": "zero1", **HALVES}, {}),
    (LAST, {"dp": 4, "ep": 4, "pp": 2, "schedule": "zb-h1", "sharding": "fsdp", **HALVES}, {}),
    (LATENT, {"tp": 2, "cp": 2, "ep": 2, "pp": 2, **SP, **HALVES}, {}),
    (GPT_OSS, {"dp": 2, "ep": 2, "pp": 2, "schedule": "zbv", "vpp": 2, "sharding": "zero2", **HALVES}, {}),
]


@pytest.mark.parametrize(
    ("model", "parallel", "run"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in AT_NIGHT)],
    ids=[" ".join(f"{k}={v}" for k, v in p.items()) for _, p, _ in [*CASES, *AT_NIGHT]],
)
def test_experts_in_a_layout_equal_one_process(
    pool: Pool, model: dict[str, Any], parallel: dict[str, Any], run: dict[str, Any]
) -> None:
    model = {**model, "heads": 6, "ffn": 36} if parallel.get("tp") == 3 else model
    model = {**model, "kv_heads": 3, "shared_ffn": 9} if parallel.get("tp") == 3 else model
    prove(
        pool,
        arguments(
            model,
            run=run,
            batch=(2 + 2 * parallel.get("ep_comm_overlap", False)) * max(2, parallel.get("dp", 1)),
            **parallel,
        ),
    )


def test_frozen_layers_are_in_balance_with_a_backward_or_without(pool: Pool) -> None:
    """One process has none behind the last frozen layer, a stage has one through all of its layers."""
    args = arguments({**DEEPSEEK, "balance_loss": 0.5}, pp=2)
    frozen = ("model.embed_tokens.*", "model.layers.[012].*")
    prove(pool, replace(args, tuning=TuningConfig(freeze=frozen)))


@pytest.mark.parametrize(
    ("seq_len", "parallel"),
    [
        pytest.param(11, {"tp": 2, "cp": 2, "ep": 2}, marks=pytest.mark.nightly, id="tp"),
        pytest.param(10, {"tp": 2, "cp": 2, "etp": 2, **SP}, id="sp"),
    ],
)
def test_slots_without_a_token_count_for_nothing(pool: Pool, seq_len: int, parallel: dict[str, Any]) -> None:
    """Rows in 12 slots: what a router sees beyond their end is in no count, no loss and no gradient."""
    prove(
        pool,
        arguments({**MIXTRAL, "router_bias": True, "router_bias_rate": 0.05}, batch=4, seq_len=seq_len, **parallel),
    )


@pytest.mark.parametrize(
    ("seq_len", "parallel"),
    [
        pytest.param(10, {"tp": 2, "cp": 2, "ep": 2, **SP}, id="sp"),
        pytest.param(11, {"tp": 2, "cp": 2, "pp": 2}, marks=pytest.mark.nightly, id="tp"),
        pytest.param(13, {"cp": 4, "ep": 4, **HALVES}, marks=pytest.mark.nightly, id="halves"),
    ],
)
def test_a_capacity_is_of_a_document_whatever_ranks_it_lies_on(
    pool: Pool, seq_len: int, parallel: dict[str, Any]
) -> None:
    args = arguments(SMALL, batch=4, seq_len=seq_len, **parallel)
    prove(pool, replace(args, data=DataConfig(packing=True)))
