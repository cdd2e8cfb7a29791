"""What makes a step fast or small leaves it what it is: fused operations, selective recomputation, direct gradients.

Faults to catch: an activation that is made again in less precision; a fused update that is written into a copy; an
update that is compiled anew in later steps; a bucket that does not hear of what has arrived; a bucket that leaves with
the first of two gradients of a tied embedding; a use of a weight that is not announced; gradients of a weight that are
counted on from one backward to the next.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from stretto.arguments import parse
from stretto.layout import Layout
from stretto.models import Microbatch
from stretto.verify import build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo

WORDS = "--preset demo --hidden 32 --heads 4 --kv-heads 2 --layers 2 --vocab 61 --seq-len 16"
WORDS += " --global-batch 4 --micro-batch 2"
ALONE = f"{WORDS} --tp 1 --pp 1 --nproc 1 --dtype fp64"
OTHER = "--activation gelu --norm layer --bias --qk-norm"


def trained(words: str, steps: int = 2) -> dict[str, Tensor]:
    """Gradients of the last step and the weights after it."""
    args = parse(words.split()).args
    with build(args, Layout.of(), World.single()) as session:
        session.load_full(random_weights(session, seed=0))
        for step in range(steps):
            # Whatever is compiled, is in the first step.
            once = patch("stretto.kernels.unguarded._compile", side_effect=AssertionError) if step else nullcontext()
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"), once:
                session.step(random_batch(args, seed=step))
        return {f"gradient of {n}": g for n, g in session.full_grads().items()} | session.full_params()


@pytest.mark.parametrize("more", ["", OTHER])
def test_light_recomputation_keeps_every_bit(more: str) -> None:
    kept, recompute = trained(f"{ALONE} {more}"), trained(f"{ALONE} {more} --recompute selective")
    assert [name for name in kept if not torch.equal(kept[name], recompute[name])] == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_fused_operations_are_the_same_and_compiled_once() -> None:
    plain, fused = trained(ALONE, 1), trained(f"{ALONE} --recompute selective --compile", 1)
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-10, atol=1e-11, msg=name)
    trained(f"{ALONE} --recompute selective --compile", 3)


@pytest.mark.parametrize("more", ["", "--recompute selective", "--no-tied"])
def test_buckets_leave_within_the_last_backward(more: str) -> None:
    """A tied embedding has two gradients: the first alone must not send its bucket, nor must it wait for more."""
    args = parse(f"{ALONE} {more} --bucket-mb 0.001".split()).args
    with build(args, Layout.of(), World.single()) as session:
        session.load_full(random_weights(session, seed=0))
        weights, stage = session.built.weights, session.built.stages[0]
        batch = random_batch(args, seed=1)
        weights.zero()
        for last, rows in enumerate((slice(0, 2), slice(2, 4))):
            if last:
                weights.reduce(0)
            stage(None, Microbatch(batch.rows(rows), torch.tensor(64.0))).backward()
            assert all(bucket.sent == bool(last) for bucket in weights.all_buckets)
        weights.finish()
