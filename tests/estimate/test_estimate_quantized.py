"""The ledger says what weights in FP8 take, to the byte: copies as they lie and transposed, and their scales.

Faults to catch: experts left out; the copy across left out; scales of all experts counted once; scales of other ranks'
experts counted; adapters counted; what predicts further tokens left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pytest

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig, RunConfig, TuningConfig
from stretto.estimate import rank_ledger
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.train.build import build
from stretto.train.groups import axes_of
from stretto.verify.session import Session, random_batch
from stretto.world import World

pytestmark = pytest.mark.gloo

SMALL: dict[str, Any] = {"layers": 2, "hidden": 64, "heads": 8, "kv_heads": 4, "head_dim": 16, "ffn": 96, "vocab": 64}
SPARSE = {**SMALL, "experts": 8, "top_k": 2, "expert_ffn": 32, "shared_ffn": 64, "shared_gate": True, "first_dense": 1}
ALONE, EXCHANGED = ParallelConfig(dp=1), ParallelConfig(dp=2, ep=2, sharding="fsdp")
CUT = ParallelConfig(dp=1, tp=2, etp=2, sequence_parallel=True)


def arguments(model: dict[str, Any], recipe: Literal["tensorwise", "rowwise"], parallel: ParallelConfig) -> Arguments:
    return Arguments(
        model=ModelConfig(**model),
        parallel=parallel,
        batch=BatchConfig(seq_len=32, micro_batch=1, global_batch=2),
        run=RunConfig(dtype="bf16", device="cpu", fp8=recipe),
    )


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize(
    ("model", "tuning"),
    [
        pytest.param(SMALL, TuningConfig(lora_rank=4, lora_targets=("q", "down")), id="adapters"),
        pytest.param({**SMALL, "activation": "gelu"}, TuningConfig(), id="not gated"),
        pytest.param({**SPARSE, "mtp_layers": 1}, TuningConfig(), id="experts"),
    ],
)
def test_the_ledger_is_what_a_step_holds(
    model: dict[str, Any], tuning: TuningConfig, recipe: Literal["tensorwise", "rowwise"]
) -> None:
    args = replace(arguments(model, recipe, ALONE), tuning=tuning)
    layout = args.parallel.layout
    with ParallelState.inspect(layout, 0, axes=axes_of(args, layout)) as state:
        assert held(args, state) == rank_ledger(args, 0).quantized


@pytest.mark.parametrize("parallel", [pytest.param(EXCHANGED, id="ep"), pytest.param(CUT, id="etp")])
def test_over_two_ranks_it_is_theirs(pool: Pool, parallel: ParallelConfig) -> None:
    args = arguments(SPARSE, "rowwise", parallel)
    assert pool.run(2, on_a_rank, args) == [rank_ledger(args, 0).quantized] * 2


def on_a_rank(world: World, args: Arguments) -> int:
    layout = args.parallel.layout
    with ParallelState.build(layout, world, axes=axes_of(args, layout)) as state:
        return held(args, state)


def held(args: Arguments, state: ParallelState) -> int:
    """Bytes that there are at the end of a step."""
    built, found = build(args, state), [0]
    within = built.stepper.steady

    @contextmanager
    def noting() -> Iterator[None]:
        with within():
            yield
            storages = [tensor.untyped_storage() for each in built.fp8 for tensor in each.held()]
            found[0] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    built.stepper.steady = noting
    built.stepper.gradients(Session(args, state, built).microbatches(random_batch(args, 0)))
    built.weights.close()
    return found[0]
