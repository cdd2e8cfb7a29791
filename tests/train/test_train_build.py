"""What `build` makes of arguments and a parallel state, seen without peers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig
from stretto.distributed import DataParallel
from stretto.layout import Layout
from stretto.models import StageSpec, Transformer
from stretto.parallel_state import ParallelState
from stretto.schedule import Schedule, lower
from stretto.schedule.sharding import MODES
from stretto.tensor_parallel import Build
from stretto.train.build import build
from stretto.train.measured import visits

pytestmark = pytest.mark.gloo

SMALL = Arguments(
    model=ModelConfig(layers=2, hidden=16, heads=2, vocab=32),
    parallel=ParallelConfig(pp=1, dp=1),
    batch=BatchConfig(seq_len=8, micro_batch=1, global_batch=1),
)


@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_go_up_on_a_communicator_of_their_own(rank: int) -> None:
    """On one communicator a gradient waits behind an activation whose sender is late."""
    args = Arguments(
        model=ModelConfig(layers=2, hidden=16, heads=2, vocab=32),
        parallel=ParallelConfig(pp=2, dp=1),
        batch=BatchConfig(seq_len=8, micro_batch=1, global_batch=2),
    )
    with ParallelState.inspect(Layout.of(pp=2), rank) as state:
        built = build(args, state)
        for executor in (built.stepper.executor, built.evaluator):
            down, up = executor.link.pairs[0, 1], executor.link.pairs[1, 0]
            assert None not in (down.group, up.group)
            assert up.group is not down.group
        built.weights.close()


def test_what_a_stage_is_gathered_for_is_read_in_the_program() -> None:
    """Two stages on a rank: the first is gathered for its forward, and once more for its backward."""
    program = lower(Schedule.parse("0F0 1F0 1B0 0B0"), MODES["fsdp"])
    assert visits(program, 0) == {0: [False, True], 1: [False]}


def test_two_copies_of_a_tied_embedding_on_one_rank_are_an_error() -> None:
    """Each would train on its own part of the gradient."""
    parts = [StageSpec.of(range(1), first=True, last=False), StageSpec.of(range(1, 2), first=False, last=True)]
    with ParallelState.inspect(Layout.of(), 0) as state:
        tied = replace(SMALL.model, tied=True)
        place = Build(state.axis("tp"), False, torch.float32)
        modules = {s: Transformer(tied, part, place, seq_len=8) for s, part in enumerate(parts)}
        with pytest.raises(ValueError, match=r"model.embed_tokens.weight lies on this rank twice"):
            DataParallel(modules, state)


def test_nothing_is_drawn_where_weights_come_from_elsewhere() -> None:
    """Numbers that a checkpoint or a model then replaces take minutes to draw; padding is zero all the same.

    Catches: memory that is left as it was found, whose padding would train and be summed into norms.
    """
    with ParallelState.inspect(Layout.of(), 0) as state:
        built = build(SMALL, state, draw=False)
        assert all(not master.any() for master in built.optimizer.masters)
        assert all(not bucket.weights.any() for bucket in built.weights.all_buckets)
        built.weights.close()
