"""P1, P4, P7, P11. Whole runs over cp against one process, in fp64: loss, gradients, norm, updates, evaluation.

Rows have an odd number of tokens, unequal masks, documents of any length; half of what a model may have is on in each.

Faults to catch: a loss that each rank of cp divides by its own tokens; labels rolled across the cut; positions counted
from the first slot; dropout by slot in place of the place in the row; sequence-parallel ranks of cp that all have the
first slots; a last token of a document that predicts the next document.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo  # the optimizer imports it: once here, not in each worker

from stretto.arguments.schema import (
    Arguments,
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from stretto.batch import Batch
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify import Comparison, against_reference, build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo


def arguments(
    parallel: ParallelConfig,
    *,
    seq_len: int = 11,
    packing: bool = False,
    recompute: str = "none",
    ffn_chunks: int = 1,
    **model: object,
) -> Arguments:
    """A small model; microbatches of two rows."""
    shape = {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "ffn": 24, "vocab": 53}
    return Arguments(
        model=ModelConfig(**{**shape, **model}),  # type: ignore[arg-type]
        parallel=replace(parallel, bucket_mb=0.005),
        batch=BatchConfig(seq_len=seq_len, micro_batch=2, global_batch=4 * (parallel.dp or 1)),
        data=DataConfig(packing=packing),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-4, clip_grad=0.5, weight_decay=0.2),
        run=RunConfig(dtype="fp64", timeout=30.0, recompute=recompute, ffn_chunks=ffn_chunks),  # type: ignore[arg-type]
    )


RUNS = {
    "tp=2, sequence parallel, learned positions, a way for each layer": arguments(
        ParallelConfig(tp=2, cp=2, dp=1, sequence_parallel=True, cp_comm=("all-gather", "needed", "ulysses")),
        seq_len=10,
        layers=3,
        position="learned",
        norm="layer",
        bias=True,
        dropout=0.2,
    ),
    "pp=2, ring and what is needed, packed, tied, dropout": arguments(
        ParallelConfig(cp=2, pp=2, dp=1, cp_comm=("ring", "needed")), packing=True, tied=True, dropout=0.2
    ),
    "hybrid, packed, one key/value head, a window": arguments(
        ParallelConfig(cp=4, dp=1, cp_comm=("hybrid",), cp_a2a=2),
        packing=True,
        kv_heads=1,
        window=4,
        global_layers=(1,),
        attention_sinks=True,
    ),
    "dp=2, fsdp, offloaded, packed, feed-forward in chunks, what auto finds": arguments(
        ParallelConfig(cp=2, dp=2, sharding="fsdp"),
        packing=True,
        recompute="offload",
        ffn_chunks=4,
        attention_softcap=2.0,
        layers=3,
    ),
}


def layout_of(args: Arguments) -> Layout:
    p = args.parallel
    cp = p.cp if p.cp_a2a is None else (p.cp_a2a, p.cp // p.cp_a2a)
    return Layout.of(tp=p.tp, cp=cp, pp=p.pp, dp=p.dp or 1)


def _compared(world: World, args: Arguments) -> Comparison:
    return against_reference(args, layout_of(args), world)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_over_cp_is_that_of_one_process(pool: Pool, name: str) -> None:
    for found in pool.run(4, _compared, RUNS[name]):
        assert not found.unequal
        assert not found.failures, [f"{d.name}: {d.error:.1e}" for d in found.failures[:8]]


@pytest.mark.parametrize("cp", [1, 4])
def test_no_token_predicts_or_sees_another_document(pool: Pool, cp: int) -> None:
    """Of the documents that count, loss and all gradients are bitwise what they were, whatever one is that does not."""
    args = arguments(ParallelConfig(cp=cp, dp=1, cp_comm=("ring",) if cp > 1 else ("auto",)), seq_len=13, packing=True)
    for before, after in pool.run(cp, _with_another_document, args):
        assert before == after


def _with_another_document(world: World, args: Arguments) -> list[list[float]]:
    batch = random_batch(args, 7)
    assert batch.starts is not None
    rows, length = batch.tokens.shape
    starts = torch.tensor([0] * 4 + [4] * 5 + [9] * (length - 9)).expand(rows, -1).contiguous()
    other = starts == 4
    mask = batch.loss_mask & ~other
    mask[:, [3, 8]] = False  # the last token of each
    found = []
    with build(args, layout_of(args), world) as session:
        weights = random_weights(session, 0)
        for shift in (0, 1):
            session.load_full(weights)
            moved = (torch.where(other, (x + shift) % 53, x) for x in (batch.tokens, batch.labels))
            loss, norm = session.step(Batch(*moved, mask, batch.samples, starts))
            grads = session.full_grads()
            found.append([loss, norm, *(x for g in grads.values() for x in g.flatten().tolist())])
    return found


def test_a_batch_of_documents_masks_the_last_token_of_each() -> None:
    args = replace(RUNS["pp=2, ring and what is needed, packed, tied, dropout"])
    batch = random_batch(args, 3)
    assert batch.starts is not None
    last = batch.starts[:, 1:] != batch.starts[:, :-1]
    assert last.any()
    assert not (batch.loss_mask[:, :-1] & last).any()
