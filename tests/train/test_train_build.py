"""What `build` makes of arguments and a parallel state, seen without peers."""

from __future__ import annotations

import pytest

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.train.build import build

pytestmark = pytest.mark.gloo


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
        for executor in (built.trainer.executor, built.evaluator):
            assert executor.link.upward is not None
            assert executor.link.upward.group not in (None, executor.link.axis.group)
        built.weights.close()
