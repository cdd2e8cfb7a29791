"""Every schedule on the real model: the gradients of GPipe bit for bit, I and W truly split, a tied embedding whole.

Faults to catch: a weight gradient that is computed in the I; a tied embedding that is two parameters on one rank; a
head that counts only with the W; an evaluation that takes the stages for single ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stretto.arguments.elsewhere import validated_in
from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig, RunConfig
from stretto.deferred import Deferred
from stretto.distributed import DataParallel
from stretto.layout import Layout
from stretto.schedule import GENERATORS, Op
from stretto.testing import Pool
from stretto.verify import build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo

ARGS = Arguments(
    model=ModelConfig(layers=6, hidden=16, heads=2, vocab=32, dropout=0.1),
    batch=BatchConfig(seq_len=8, micro_batch=1, global_batch=5),
    run=RunConfig(deterministic=True),
)


CUT: dict[int, tuple[float, ...]] = {
    2: (2.5, 3.5),
    3: (1.5, 1, 3.5),
    4: (1.5, 1.5, 2, 1),
    6: (0.5, 1.5, 1, 0.5, 1.5, 1),
}
"""Of so many stages the layers of each, some of them cut between attention and feed-forward."""


def run_with(
    name: str, pp: int, vpp: int | None = None, *, tied: bool = False, tp: int = 1
) -> tuple[Arguments, Layout]:
    made = GENERATORS[name]
    v = vpp or made.stages
    layout = Layout.of(tp=tp, pp=pp, vpp=v, shape=made.shape_of(v))
    held = None if name == "gpipe" else CUT.get(pp * v)  # what all are held against has whole layers
    parallel = ParallelConfig(tp=tp, pp=pp, dp=1, vpp=v, sequence_parallel=tp > 1, stage_layers=held)
    parallel = replace(parallel, schedule=name)  # type: ignore[arg-type]
    model = replace(ARGS.model, tied=tied)
    return validated_in(replace(ARGS, parallel=parallel, model=model), layout).args, layout


def gradients(world: World, args: Arguments, layout: Layout) -> tuple[dict[str, Tensor], float]:
    with build(args, layout, world) as session:
        session.load_full(random_weights(session, 0))
        before = session.evaluate(random_batch(args, 2))
        loss, _ = session.step(random_batch(args, 1))
        return {**session.full_grads(), "evaluation": torch.tensor(before)}, loss


def every(world: World, pp: int, tied: bool) -> dict[str, tuple[dict[str, Tensor], float]]:
    found = {name: gradients(world, *run_with(name, pp, tied=tied)) for name in GENERATORS}
    return {**found, "auto of three": gradients(world, *run_with("auto", pp, 3, tied=tied))}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_gradients_are_those_of_gpipe_bit_for_bit(pool: Pool, ranks: int) -> None:
    """Microbatches add up in one order in all of them, so that nothing may differ."""
    found = pool.run(ranks, every, ranks, False)[0]
    expected, loss = found["gpipe"]
    for name, (grads, other) in found.items():
        assert other == loss, name
        assert grads.keys() == expected.keys()
        wrong = [n for n, g in grads.items() if not torch.equal(g, expected[n])]
        assert not wrong, (name, wrong)


def test_a_tied_embedding_is_one_parameter_wherever_its_ends_lie(pool: Pool) -> None:
    """In a V both ends are on rank 0; in a loop on two ranks: two sums in another order, so within rounding."""
    found = pool.run(2, every, 2, True)[0]
    expected, loss = found["gpipe"]
    for name, (grads, other) in found.items():
        assert other == pytest.approx(loss, rel=1e-6)
        for n, g in grads.items():
            torch.testing.assert_close(g, expected[n], rtol=1e-5, atol=1e-6, msg=f"{name}: {n}")


def test_more_stages_than_layers_and_tensor_parallel(pool: Pool) -> None:
    """Eight stages, some of a sublayer alone, on two ranks of two: the same gradients as one process."""
    single = pool.run(1, gradients, *run_with("1f1b", 1))[0][0]
    found = pool.run(4, gradients, *run_with("interleaved-zb", 2, 4, tp=2))[0][0]
    for n, g in found.items():
        torch.testing.assert_close(g, single[n], rtol=1e-4, atol=1e-6, msg=n)


def test_the_weight_gradients_come_with_w(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every GEMM of a layer: four of them (q, k and v are one, gate and up too); the embedding's with stage 0."""
    jobs: dict[tuple[int, int], int] = {}
    run = Deferred.run

    def counted(self: Deferred, stage: int, mb: int) -> None:
        jobs[stage, mb] = len(self._jobs[stage, mb])
        run(self, stage, mb)

    monkeypatch.setattr(Deferred, "run", counted)
    args, layout = run_with("zbv", 1)
    with build(args, layout, World.single()) as session:
        session.step(random_batch(args, 1))
        program = session.built.stepper.executor.program
    assert Counter(a.op for a in program.ranks[0])[Op.W] == 2 * 5
    # Two layers and the attention of the third, and the embedding; then its feed-forward, and three layers.
    assert jobs == {(s, mb): (4 * 2 + 2 + 1, 2 + 4 * 3)[s] for s in range(2) for mb in range(5)}


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_every_bucket_has_left_when_the_last_backward_is_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a W is a stage's last, norms and biases had their gradients before: a bucket that waited for those would
    leave only at the end, right but not overlapped."""
    left: list[bool] = []
    finish = DataParallel.finish

    def noted(self: DataParallel) -> None:
        left.extend(bucket.sent for bucket in self.all_buckets)
        finish(self)

    monkeypatch.setattr(DataParallel, "finish", noted)
    args, layout = run_with(name, 1)
    with build(args, layout, World.single()) as session:
        session.step(random_batch(args, 1))
    assert left
    assert all(left)
