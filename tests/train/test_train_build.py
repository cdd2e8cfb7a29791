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
from stretto.tensor_parallel import Build
from stretto.train.build import build

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
        for executor in (built.trainer.executor, built.evaluator):
            down, up = executor.link.pairs[0, 1], executor.link.pairs[1, 0]
            assert None not in (down.group, up.group)
            assert up.group is not down.group
        built.weights.close()


def test_two_copies_of_a_tied_embedding_on_one_rank_are_an_error() -> None:
    """Each would train on its own part of the gradient."""
    parts = [StageSpec(range(1), first=True, last=False), StageSpec(range(1, 2), first=False, last=True)]
    with ParallelState.inspect(Layout.of(), 0) as state:
        tied = replace(SMALL.model, tied=True)
        place = Build(state.axis("tp"), False, torch.float32)
        modules = {s: Transformer(tied, part, place, seq_len=8) for s, part in enumerate(parts)}
        with pytest.raises(ValueError, match=r"model.embed_tokens.weight lies on this rank twice"):
            DataParallel(modules, state)
