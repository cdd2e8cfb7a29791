"""P14 over kinds of sharding: what one wrote, any other reads to the bit, on another number of ranks.

Saves are asynchronous, and the next step is made while the writers write.

Faults to catch: a shard saved at another's place; a piece without an owner; parameters that do not follow what was
read; a copy that follows the next step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.checkpoint import Saver, load
from stretto.checkpoint.directory import step_path
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify import build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo

RUN = Arguments(
    model=ModelConfig(layers=3, hidden=12, heads=2, head_dim=6, ffn=10, vocab=29, tied=True, bias=True),
    batch=BatchConfig(seq_len=4, micro_batch=1, global_batch=12),
    optimizer=OptimizerConfig(lr=1e-2),
    run=RunConfig(dtype="bf16", timeout=30.0),
)
Mode = tuple[str, int, int, int, str]
"""Sharding, tp, pp, dp, schedule."""
WRITERS: list[Mode] = [
    ("none", 1, 2, 1, "zb-h1"),
    ("zero1", 1, 1, 3, "1f1b"),
    ("zero2", 2, 1, 2, "1f1b"),
    ("fsdp", 1, 2, 2, "gpipe"),
]
READERS: list[Mode] = [
    ("none", 1, 1, 2, "1f1b"),
    ("zero1", 2, 1, 2, "1f1b"),
    ("zero2", 1, 2, 2, "1f1b"),
    ("fsdp", 1, 1, 4, "1f1b"),
]


@pytest.mark.parametrize("turns", [(1,), pytest.param((0, 2, 3), marks=pytest.mark.nightly)])
def test_every_mode_reads_what_every_other_wrote(pool: Pool, tmp_path: Path, turns: tuple[int, ...]) -> None:
    """On a commit each reads what one other wrote, and it is read by one other."""
    for n, writer in enumerate(WRITERS):
        directory = tmp_path / writer[0]
        wrote = pool.run(writer[1] * writer[2] * writer[3], _write, writer, directory)[0]
        for reader in (READERS[(n + turn) % len(READERS)] for turn in turns):
            for read, unequal in pool.run(reader[1] * reader[2] * reader[3], _read, reader, directory):
                assert unequal == []
                assert read.keys() == wrote.keys()
                assert [name for name in wrote if not torch.equal(read[name], wrote[name])] == []


def test_moments_in_bf16_that_only_some_parameters_have(pool: Pool, tmp_path: Path) -> None:
    run = replace(RUN, optimizer=OptimizerConfig(optimizer="muon", lr=1e-2, moments="bf16"))
    wrote = pool.run(4, _write, ("fsdp", 1, 2, 2, "1f1b"), tmp_path, run)[0]
    assert {t.dtype for name, t in wrote.items() if name.startswith("exp")} == {torch.bfloat16}
    for read, unequal in pool.run(2, _read, ("none", 2, 1, 1, "1f1b"), tmp_path, run):
        assert (unequal, read.keys()) == ([], wrote.keys())
        assert [name for name in wrote if not torch.equal(read[name], wrote[name])] == []


PARTITIONS: list[tuple[Mode, tuple[float, ...]]] = [
    (("fsdp", 1, 2, 2, "gpipe"), (1.5, 1.5)),
    (("none", 1, 2, 1, "zb-h1"), (0.5, 2.5)),
    (("zero1", 2, 2, 1, "1f1b"), (2, 1)),
]


def test_any_partition_reads_what_another_wrote(pool: Pool, tmp_path: Path) -> None:
    """Blocks that are cut between attention and feed-forward keep their names: all that is read is as it was."""
    for n, (writer, layers) in enumerate(PARTITIONS):
        reader, others = PARTITIONS[n - 1]
        runs = [replace(RUN, parallel=ParallelConfig(stage_layers=each)) for each in (layers, others)]
        wrote = pool.run(writer[1] * writer[2] * writer[3], _write, writer, tmp_path / str(n), runs[0])[0]
        for read, unequal in pool.run(reader[1] * reader[2] * reader[3], _read, reader, tmp_path / str(n), runs[1]):
            assert (unequal, read.keys()) == ([], wrote.keys())
            assert [name for name in wrote if not torch.equal(read[name], wrote[name])] == []


def _in(mode: Mode, run: Arguments = RUN) -> tuple[Arguments, Layout]:
    sharding, tp, pp, dp, schedule = mode
    said = {"sharding": sharding, "schedule": schedule, "bucket_mb": 0.001}
    parallel = ParallelConfig(tp=tp, pp=pp, dp=dp, stage_layers=run.parallel.stage_layers, **said)  # type: ignore[arg-type]
    return replace(run, parallel=parallel), Layout.of(tp=tp, pp=pp, dp=dp)


def _write(world: World, mode: Mode, directory: Path, run: Arguments = RUN) -> dict[str, Tensor]:
    with build(*_in(mode, run), world) as session:
        session.load_full(random_weights(session, 0))
        session.step(random_batch(RUN, 1))
        saver = Saver(world, group=session.world.group)
        saver.begin(directory, 1, session.built.optimizer.slices(), {})
        before = {name: x.clone() for name, x in session.full_state().items()}
        session.step(random_batch(RUN, 2))
        saver.finish()
        saver.close()
        return before


def _read(world: World, mode: Mode, directory: Path, run: Arguments = RUN) -> tuple[dict[str, Tensor], list[str]]:
    with build(*_in(mode, run), world) as session:
        optimizer = session.built.optimizer
        load(step_path(directory, 1), optimizer.slices(), world, group=session.world.group)
        optimizer.loaded(1)
        return session.full_state(), session.unequal_replicas()
