"""Masters with a remainder, and state in the host's memory: the same update, to the last bit, in every mode.

Faults to catch: a remainder that does not carry; ties that round to zero; a NaN that becomes a number; a chunk that is
not written back; a slot that is filled before it was emptied; moments of another chunk; a gradient of another chunk;
masters that are lent and not taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.checkpoint import Saver, load
from stretto.checkpoint.directory import step_path
from stretto.distributed import AdamWRule, DataParallel, Optimizer, residence
from stretto.distributed.remainder import joined, parted
from stretto.layout import Layout
from stretto.layout.chunks import chunks
from stretto.parallel_state import ParallelState
from stretto.params import Init, ParamSpec, declare
from stretto.testing import Pool
from stretto.verify import Comparison, Session, against_reference, build, random_batch
from stretto.world import World

pytestmark = pytest.mark.gloo

SMALL = 192
"""Elements of a chunk here: buckets have many."""


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
def test_any_master_comes_back(bits: list[int]) -> None:
    masters = torch.tensor(bits, dtype=torch.uint32).view(torch.int32).view(torch.float32)
    wide, remainder = parted(masters)
    weights = wide.bfloat16()
    back = joined(weights, remainder)
    numbers = ~masters.isnan()
    assert torch.equal(back[numbers].view(torch.int32), masters[numbers].view(torch.int32))
    assert back[~numbers].isnan().all()
    assert weights[~numbers].isnan().all()
    # The nearest one; of two as near the one that is larger.
    exact, even = masters.double(), masters.bfloat16().double()
    finite = masters.isfinite() & weights.isfinite() & even.isfinite()
    away, near = (weights.double() - exact).abs()[finite], (even - exact).abs()[finite]
    assert (away == near).all()
    assert (weights.double().abs()[finite] >= even.abs()[finite]).all()


def test_masters_with_a_remainder_move_as_masters_in_fp32() -> None:
    """Of the same gradients; the weights differ where a master lies half-way between two alone."""
    fp32, split = updated(), updated(remainder=True)
    for step, (one, other) in enumerate(zip(fp32, split, strict=True)):
        assert all(torch.equal(one[name], other[name]) for name in one if name != "weight"), step
        tie = one["model/weight"].view(torch.int32) & 0xFFFF == 0x8000
        assert torch.equal(one["weight"][~tie], other["weight"][~tie])


def updated(**options: Any) -> list[dict[str, Tensor]]:
    """Weights and state after each of some updates from given gradients."""
    net, found = nn.Module(), []
    weight = declare(net, "weight", ParamSpec((700, 5), Init(std=0.5)), dtype=torch.bfloat16)
    with ParallelState.build(Layout.of(), World.single()) as state, DataParallel({0: net}, state) as weights:
        optimizer = Optimizer(weights, AdamWRule((0.9, 0.95), 1e-8, 0.1), **options)
        optimizer.initialize(3)
        for step in range(4):
            weights.zero()
            weight.backward(torch.randn(700, 5, generator=torch.Generator().manual_seed(step)).bfloat16())
            weights.finish()
            optimizer.step(3e-3, torch.tensor(0.7))
            kept = {piece.name: piece.tensor.clone() for piece in optimizer.slices()}
            found.append({"weight": weight.detach().clone(), **kept})
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_next_forward_waits_for_what_it_uses() -> None:
    """Chunks on three streams, beside forwards that begin at once: the bits of an update that is waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residence, "chunks", lambda numel: chunks(numel, 2**18))
        for options in ({}, {"remainder": True, "moments": torch.bfloat16}):
            resident, offloaded = (on_gpu(cpu_offload=away, **options) for away in (False, True))
            assert resident.keys() == offloaded.keys()
            assert [name for name in resident if not torch.equal(resident[name], offloaded[name])] == []


def on_gpu(**options: Any) -> dict[str, Tensor]:
    """State, weights and loss after some steps, of which the host waits for none."""
    layers = [nn.Linear(1024, 1024, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    for layer in layers:
        declare(layer, "weight", ParamSpec((1024, 1024), Init(std=0.03)))
    net = nn.Sequential(*layers)
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    world = World.single("cuda")
    with ParallelState.build(Layout.of(), world) as state, DataParallel({0: net}, state, bucket_mb=4) as weights:
        optimizer = Optimizer(weights, AdamWRule((0.9, 0.95), 1e-8, 0.1), **options)
        optimizer.initialize(3)
        for _ in range(5):
            weights.zero()
            loss = net(x).square().mean()
            loss.backward()
            weights.finish()
            optimizer.step(1e-2, torch.ones((), device="cuda"))
        found = {piece.name: piece.tensor.cpu().clone() for piece in optimizer.slices()}
        return {"loss": loss.detach().cpu(), **found, **{n: p.detach().cpu() for n, p in net.named_parameters()}}


MODES: list[tuple[str, dict[str, Any]]] = [
    ("none", {"masters": "fp32"}),
    ("zero1", {"masters": "remainder", "moments": "bf16"}),
    ("zero2", {"masters": "fp32", "moments": "bf16", "optimizer": "muon"}),
    ("fsdp", {"masters": "remainder"}),
]


def test_offloaded_state_changes_no_bit(pool: Pool, tmp_path: Path) -> None:
    """In every mode: losses, weights and state of three steps; a checkpoint goes from one to the other and back."""
    for ranks in pool.run(2, _offloaded, tmp_path):
        assert ranks == {mode: [] for mode, _ in MODES}


def test_weights_of_masters_in_two_parts_are_rounded_by_these() -> None:
    """A master halfway between two weights goes away from zero there, and to the even one everywhere else."""
    with build(example("none", {"masters": "remainder"}, dp=1), Layout.of(), World.single()) as session:
        full = session.full_params()
        name = next(name for name in full if name.endswith("q_proj.weight"))
        full[name] = torch.full_like(full[name], 1 + 2**-8)
        assert full[name].bfloat16().unique().tolist() == [1.0]
        session.load_full(full)
        assert session.unequal_replicas() == []


def test_verify_takes_masters_in_two_parts(pool: Pool) -> None:
    """Its reference in fp64 has none."""
    args = example("zero1", {"masters": "remainder"})
    assert all(found.equal for found in pool.run(2, against_layout, args))


def against_layout(world: World, args: Arguments) -> Comparison:
    return against_reference(args, Layout.of(dp=world.size), world)


def example(mode: str, options: dict[str, Any], dp: int = 2) -> Arguments:
    return Arguments(
        model=ModelConfig(layers=2, hidden=32, heads=4, head_dim=8, ffn=40, vocab=53, tied=True),
        parallel=ParallelConfig(dp=dp, sharding=mode, bucket_mb=0.02),  # type: ignore[arg-type]
        batch=BatchConfig(seq_len=8, micro_batch=1, global_batch=4),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.5, **options),
        run=RunConfig(dtype="bf16", timeout=30.0),
    )


def _offloaded(world: World, directory: Path) -> dict[str, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residence, "chunks", _small)
        return {mode: list(_differences(world, example(mode, options), directory / mode)) for mode, options in MODES}


def _small(numel: int) -> Iterator[range]:
    return chunks(numel, SMALL)


def _differences(world: World, args: Arguments, directory: Path) -> Iterator[str]:
    """What differs between a run whose state is offloaded after a step and one whose state is not."""
    layout = Layout.of(dp=2)
    away = replace(args, optimizer=replace(args.optimizer, optimizer_cpu_offload=True))
    batches = [random_batch(args, seed) for seed in range(3)]
    with build(args, layout, world) as session:
        figures = [session.step(batch) for batch in batches]
        state = session.full_state()
    with build(away, layout, world) as session:
        if [session.step(batch) for batch in batches[:2]] != figures[:2]:
            yield "figures"
        _save(session, world, directory)
        if session.step(batches[2]) != figures[2] or _unequal(session, state):
            yield "state"
        yield from session.unequal_replicas()
    for again, name in ((args, "resident"), (away, "offloaded")):
        with build(again, layout, world) as session:
            load(step_path(directory, 2), session.built.optimizer.slices(), world, group=session.world.group)
            session.built.optimizer.loaded(2)
            if session.step(batches[2]) != figures[2] or _unequal(session, state):
                yield f"resumed {name}"


def _save(session: Session, world: World, directory: Path) -> None:
    saver = Saver(world, group=session.world.group)
    saver.begin(directory, 2, session.built.optimizer.slices(), {})
    saver.finish()
    saver.close()


def _unequal(session: Session, state: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in session.full_state().items() if not torch.equal(tensor, state[name])]
