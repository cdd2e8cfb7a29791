"""Microbatches under way in a stage, which activations are counted by, for every schedule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig, RunConfig
from stretto.estimate import count_parameters, fullest, rank_ledger
from stretto.estimate.moments import stage_activations
from stretto.estimate.sizes import in_flight
from stretto.schedule import GENERATORS, Op, Schedule, schedule_for
from stretto.schedule.greedy import most_alive

pytestmark = pytest.mark.pure


def at_once(s: Schedule, stage: int) -> int:
    """The most, counted along the list of its rank."""
    live = most = 0
    for action in s.ranks[s.placement[stage]]:
        if action.stage == stage:
            live += {Op.F: 1, Op.B: -1, Op.W: -1}.get(action.op, 0)
        most = max(most, live)
    return most


@pytest.mark.parametrize("name", sorted(set(GENERATORS) - {"auto"}))
@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 5), (3, 2), (4, 8), (4, 23)])
def test_as_many_as_the_order_has(name: str, pp: int, m: int) -> None:
    """Catches 1F1B's figure for every schedule, which was less than none beyond the first stage of a rank."""
    parallel = ParallelConfig(pp=pp, dp=1, schedule=name)  # type: ignore[arg-type]
    args = Arguments(batch=BatchConfig(global_batch=m, micro_batch=1), parallel=parallel)
    s = schedule_for(name, pp, m)
    assert [in_flight(args, k) for k in range(s.num_stages)] == [at_once(s, k) for k in range(s.num_stages)]


def test_of_an_order_that_is_searched_as_many_as_it_may_have() -> None:
    batch = BatchConfig(global_batch=16, micro_batch=1)
    for memory, expected in ((None, 4), (2.5, 3), (40.0, 16)):
        parallel = ParallelConfig(pp=4, dp=1, schedule="auto", schedule_memory=memory)
        assert in_flight(Arguments(batch=batch, parallel=parallel), 7) == expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_a_rank_has_the_weights_of_all_of_its_stages(name: str, tied: bool) -> None:
    """Catches a table that leaves out all stages but the first of a rank, logits on the wrong rank, activations as if
    all stages of a rank held most at the same time, and a tied embedding twice on the rank that has both ends."""
    parallel = ParallelConfig(pp=2, dp=1, schedule=name)  # type: ignore[arg-type]
    model = ModelConfig(layers=8, hidden=64, heads=4, vocab=64, tied=tied)
    batch = BatchConfig(global_batch=8, micro_batch=1, seq_len=32)
    args = Arguments(model=model, batch=batch, parallel=parallel)
    found = [rank_ledger(args, rank) for rank in range(2)]
    assert sum(each.weights for each in found) == 4 * (
        count_parameters(model, 32).total + 64 * 64 * (tied and name != "zbv")
    )
    s = schedule_for(name, 2, 8)
    last = s.num_stages - 1
    assert [any(m.name == "head" for m in stage_activations(args, k).moments) for k in range(last + 1)] == [
        k == last for k in range(last + 1)
    ]
    one = stage_activations(args, 1).kept
    for rank, most in enumerate(most_alive(s)):  # one of these is at work, and holds some more
        assert most * one <= (found[rank].activations + found[rank].working) * 1.03 <= (most + 0.6) * one


@given(
    pp=st.integers(1, 9),
    name=st.sampled_from(["1f1b", "gpipe", "interleaved", "zbv", "zb-h1"]),
    layers=st.integers(9, 40),
    sharding=st.sampled_from(["none", "zero1", "fsdp"]),
    recompute=st.sampled_from(["none", "selective", "block"]),
    dense=st.integers(0, 3),
)
def test_the_fullest_rank_is_that_of_all(
    pp: int, name: str, layers: int, sharding: str, recompute: str, dense: int
) -> None:
    """Catches: the ends of the pipeline looked at alone, where a rank between them has a layer more."""
    sparse = {"experts": 4, "expert_ffn": 16, "first_dense": dense} if dense else {}
    model = ModelConfig(layers=layers, hidden=64, heads=4, vocab=3000, ffn=96, **sparse)  # type: ignore[arg-type]
    parallel = ParallelConfig(pp=pp, dp=2, schedule=name, sharding=sharding)  # type: ignore[arg-type]
    batch = BatchConfig(global_batch=2 * 12, micro_batch=1, seq_len=32)
    run = RunConfig(recompute=recompute)  # type: ignore[arg-type]
    args = Arguments(model=model, batch=batch, parallel=parallel, run=run)
    assert fullest(args) == max(rank_ledger(args, rank).total for rank in range(pp))
