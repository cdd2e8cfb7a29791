"""P9 of every kind of sharding: what a rank keeps a part of changes nothing; and it keeps no more, and copies nothing.

Faults to catch: a shard that is another rank's; gradients of earlier microbatches forgotten; a norm of one rank's
part; copies whose gradients are not summed; weights that do not follow their shard; a section that stays gathered;
gradients whose memory stays; a shard that is written while others read it; a checkpoint that is loaded while others
read; weights that are copied on their way; a model that is whole before it is sharded.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from declared_net import ADAMW, Net, adamw, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from readable import make_readable
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.distributed import AdamW, Bucket, DataParallel, clip_factor, grad_norm
from stretto.distributed.memory import here
from stretto.estimate import ledger
from stretto.estimate.steady import steady
from stretto.layout import Layout
from stretto.layout.grouping import by_section
from stretto.parallel_state import ParallelState, default_axes
from stretto.params import Init, ParamSpec, declare
from stretto.schedule.sharding import MODES
from stretto.testing import Pool
from stretto.train.build import build as build_run
from stretto.verify import Comparison, against_reference, build, random_batch
from stretto.world import World

pytestmark = pytest.mark.gloo

SHARDED = tuple(mode for mode in MODES if mode != "none")
STEPS, MICROBATCHES = 3, 2


def plain() -> dict[str, Tensor]:
    """Weights and moments of one process, torch alone."""
    net = Net()
    adam = adamw(net)
    for step in range(STEPS):
        adam.zero_grad()
        net(rows(step)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.7)
        adam.step()
    found = {f"model/{name}": p.detach() for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        found |= {f"{kind}/{name}": adam.state[p][kind] for kind in ("exp_avg", "exp_avg_sq")}
    return found


@settings(max_examples=settings.default.max_examples // 5)
@given(
    sizes=st.lists(st.one_of(st.floats(1e-9, 1e-3), st.floats(1e-3, 100.0)), min_size=1, max_size=3),
    keep=st.integers(0, 3),
)
@pytest.mark.parametrize("dp", [1, 2, 3, pytest.param(5, marks=pytest.mark.nightly)])
def test_any_mode_and_bucket_size_equals_one_process(pool: Pool, dp: int, sizes: list[float], keep: int) -> None:
    """Weights and moments, each rank's part of them at its place, and the weights that it computes with."""
    _equals(plain(), pool.run(dp, _train, sizes, keep), len(sizes))


@pytest.mark.parametrize("dp", [2, 3])
def test_shards_that_others_read_where_they_lie_equal_one_process(pool: Pool, dp: int) -> None:
    """As on GPUs that reach each other; nothing is written before all have read it."""
    sizes = [1e-9, 1e-3]
    _equals(plain(), pool.run(dp, _train, sizes, 1, True), len(sizes))


def _equals(want: dict[str, Tensor], ranks: Sequence[dict[str, Any]], times: int) -> None:
    for mode in SHARDED:
        seen = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
        for name, offsets, tensor in (piece for rank in ranks for piece in rank[mode]):
            where = tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
            torch.testing.assert_close(tensor, want[name][where], rtol=0, atol=1e-12, msg=f"{mode} {name}")
            seen[name][where] += 1
        assert all((count == times).all() for name, count in seen.items()), mode


@pytest.mark.parametrize(
    ("mode", "tp", "pp", "dp", "options"),
    [
        pytest.param(mode, *sizes, marks=[pytest.mark.nightly] * (mode != "fsdp" and m != n))
        for m, mode in enumerate(SHARDED)
        for n, sizes in enumerate([(1, 1, 3, False), (2, 1, 2, True), (1, 2, 2, True)])
    ],
)
def test_a_model_in_every_mode_equals_one_process(
    pool: Pool, mode: str, tp: int, pp: int, dp: int, options: bool
) -> None:
    for found in pool.run(tp * pp * dp, _compare, example(tp, pp, dp, mode, options=options)):
        assert not found.unequal
        assert not found.failures, [f"{d.name}: {d.error:.1e}" for d in found.failures[:5]]


@pytest.mark.parametrize("mode", [pytest.param("zero1", marks=pytest.mark.nightly), "zero2", "fsdp"])
def test_shards_within_copies_equal_one_process(pool: Pool, mode: str) -> None:
    """dp = (2, 2): sharded over two ranks, of which there are two copies, whose gradients are summed once more."""
    args = example(1, 1, 4, mode, options=True)
    for found in pool.run(4, _compare_levels, args):
        assert not found.unequal
        assert not found.failures, [f"{d.name}: {d.error:.1e}" for d in found.failures[:5]]


def test_no_more_is_kept_than_the_mode_says(pool: Pool) -> None:
    """Of 8 blocks two are whole at a time and two have gradients; of what is sharded a rank keeps its part."""
    for rank in pool.run(2, _memory):
        assert rank["zero1"] == (8, 8, 2.0)
        assert rank["zero2"][1:] == (2, 2.0)
        assert rank["fsdp"] == (2, 2, 2.0)


def test_a_model_larger_than_what_a_rank_keeps_never_exists(pool: Pool) -> None:
    """While it is built, no more is there at a time than what stays, and one section's weights and gradients.

    Over eight ranks: over four what stays of 16 bytes a parameter is as much as the whole model's weights.
    """
    for most, stays, section in pool.run(8, _start):
        assert most <= stays + 4 * section


def test_nothing_is_copied_in_or_out(pool: Pool) -> None:
    """In a whole step neither weights nor gradients are copied or packed; and no more is there than the ledger says."""
    for rank in pool.run(2, _copies):
        assert rank == dict.fromkeys(SHARDED, (0, True, True))


def example(tp: int, pp: int, dp: int, mode: str, *, options: bool) -> Arguments:
    return Arguments(
        model=ModelConfig(
            layers=3,
            hidden=16,
            heads=4,
            kv_heads=1 if options else 4,
            head_dim=4,
            ffn=24,
            vocab=53,
            norm="layer" if options else "rms",
            position="learned" if options else "rope",
            activation="gelu" if options else "swiglu",
            bias=options,
            tied=options,
            qk_norm=options,
        ),
        parallel=ParallelConfig(
            tp=tp,
            pp=pp,
            dp=dp,
            sequence_parallel=tp > 1,
            bucket_mb=0.005,
            sharding=mode,  # type: ignore[arg-type]
        ),
        batch=BatchConfig(seq_len=8, micro_batch=1, global_batch=4 * dp),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.5),
        run=RunConfig(dtype="fp64", timeout=30.0, recompute="block" if pp > 1 else "none"),
    )


def _compare(world: World, args: Arguments) -> Comparison:
    p = args.parallel
    return against_reference(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world)


def _compare_levels(world: World, args: Arguments) -> Comparison:
    return against_reference(args, Layout.of(dp=(2, 2)), world)


def _train(
    world: World, sizes: Sequence[float], keep: int, readable: bool = False
) -> dict[str, list[tuple[str, tuple[int, ...], Tensor]]]:
    found: dict[str, list[tuple[str, tuple[int, ...], Tensor]]] = {mode: [] for mode in SHARDED}
    axes = (*default_axes(Layout.of(dp=world.size)), ("dp:gather", "cp"))
    with ParallelState.build(Layout.of(dp=world.size), world, axes=axes) as state:
        memories = make_readable(state) if readable else []
        for mode, size in ((mode, size) for mode in SHARDED for size in sizes):
            net, limit = Net(), (int(size * 2**20) // 8,)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(by_section, "__defaults__", limit)
                made = DataParallel({0: net}, state, bucket_mb=size, sharding=MODES[mode], keep=keep)
            with made as weights:
                adam = AdamW(weights, **ADAMW)
                for step in range(STEPS):
                    weights.zero()
                    mine = rows(step).chunk(world.size)[world.rank].chunk(MICROBATCHES)
                    for n, microbatch in enumerate(mine):
                        if n == len(mine) - 1 or MODES[mode].reduce_each:
                            weights.reduce(0)
                        net(microbatch).backward()
                    weights.finish()
                    adam.step(1e-2, clip_factor(grad_norm(weights), 0.7))
                pieces = adam.slices()
                found[mode] += [(p.name, p.offsets, p.tensor.clone()) for p in pieces if p.owner]
                with weights.whole():
                    for item in weights.declared:
                        masters = [p for p in pieces if p.name == f"model/{item.name}"]
                        for p in masters:
                            where = tuple(slice(o, o + n) for o, n in zip(p.offsets, p.tensor.shape, strict=True))
                            assert torch.equal(item.param.data[where], p.tensor), f"{mode}: {item.name}"
                _loads_others(weights, adam)
        assert all(memory.messages for memory in memories if memory.axis.name in ("dp-cp", "dp:gather-cp"))
    return found


def _loads_others(weights: DataParallel, adam: AdamW) -> None:
    """After a step as from a checkpoint, while weights of that step are on their way; readable memory looks."""
    weights.finish()
    adam.step(1e-2)
    for piece in adam.slices():
        piece.tensor.mul_(2)
    adam.loaded(STEPS)
    for each in weights.all_buckets:
        each.gathered()
        each.settle()
        each.release()


class Blocks(nn.Module):
    """Eight matrices, each a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(8))
        for block in self.blocks:
            declare(block, "weight", ParamSpec((64, 64), Init(std=0.1)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return x.square().sum()


def _memory(world: World) -> dict[str, tuple[int, int, float]]:
    """Of each mode: buckets that are whole, and that have gradients, at most; and the part of the state."""
    found = {}
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        for mode in SHARDED:
            net = Blocks()
            with DataParallel({0: net}, state, bucket_mb=64 * 64 * 4 / 2**20, sharding=MODES[mode]) as weights:
                adam = AdamW(weights, **ADAMW)
                whole, gradients = [0], [0]
                look = partial(_look, weights, whole, gradients)
                for block in net.blocks:
                    block.register_forward_hook(look)
                    block.weight.register_post_accumulate_grad_hook(look)
                for _ in range(2):
                    weights.zero()
                    for _ in range(2):
                        if mode != "zero1":
                            weights.reduce(0)
                        net(torch.ones(4, 64)).backward()
                    weights.finish()
                    look()
                    adam.step(1e-3)
                if mode != "zero1":
                    assert gradients[-1] == 0
                state_ = sum(master.numel() for master in adam.masters)
                found[mode] = max(whole), max(gradients), 8 * 64 * 64 / state_
    return found


def _look(weights: DataParallel, whole: list[int], gradients: list[int], *_: object) -> None:
    whole.append(sum(bucket.whole for bucket in weights.all_buckets))
    gradients.append(sum(here(bucket.grads) for bucket in weights.all_buckets))


def _bytes(buckets: Sequence[Bucket], gathered: list[int], reducing: list[int], *_: object) -> None:
    gathered.append(sum(bucket.weights.nbytes for bucket in buckets if bucket.whole))
    reducing.append(sum(bucket.grads.nbytes for bucket in buckets if here(bucket.grads)))


class Allocated(TorchDispatchMode):
    """The most bytes that large tensors made within it hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[Any] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.nbytes >= 2**14:
            self.storages.append(weakref.ref(out.untyped_storage()))
        there = {s.data_ptr(): s.nbytes() for ref in self.storages if (s := ref()) is not None and s.nbytes()}
        self.most = max(self.most, sum(there.values()))
        return out


def _start(world: World) -> tuple[int, int, int]:
    args = example(1, 1, world.size, "fsdp", options=False)
    args = replace(args, model=replace(args.model, layers=12, hidden=64, head_dim=16, ffn=128), run=RunConfig())
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        with Allocated() as allocated:
            built = build_run(args, state)
        kept = ledger(args, 0)
        built.weights.close()
        stays = kept.weights + kept.gradients + kept.masters + kept.optimizer
        return allocated.most, stays, max(bucket.flat.numel for bucket in built.weights.all_buckets) * 4


class Copied(TorchDispatchMode):
    """Counts elements that copies, concatenations and clones move, of tensors as large as a shard of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copying = ("copy_", "cat", "clone", "_to_copy", "split_with_sizes_copy", "stack")
        name = func.overloadpacket.__name__
        # Over Gloo torch itself copies a shard's sum, of 1,152 elements, as one waits for it.
        if name in copying and isinstance(out, Tensor) and out.numel() >= (2048 if name == "copy_" else 1024):
            self.elements += out.numel()
        return out


def _copies(world: World) -> dict[str, tuple[int, bool, bool]]:
    found = {}
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        for mode in SHARDED:
            args = example(1, 1, world.size, mode, options=False)
            with build(args, Layout.of(dp=world.size), world) as session:
                trainer, buckets = session.built.stepper, session.built.weights.all_buckets
                gathered, reducing = [0], [0]

                look = partial(_bytes, buckets, gathered, reducing)
                for module in session.built.stages[0].modules():
                    module.register_forward_pre_hook(look)
                for item in session.built.weights.declared:
                    item.param.register_post_accumulate_grad_hook(look)
                for step in range(2):
                    with Copied() as copied:
                        trainer.step(session.microbatches(random_batch(args, step)), 1e-3)
            kept = steady(args, 0, embedding=True)
            every = [(at, back) for at in range(args.model.layers + 2) for back in (False, True)]
            whole = max(kept.sections.gathered(at, back=back) for at, back in every)
            fills = max(kept.filling + kept.sections.filling(at, back=back) for at, back in every)
            fits = (max(gathered) <= (whole or kept.weights), max(reducing) <= (fills or kept.gradients))
            found[mode] = (copied.elements, *fits)
    assert state.world.size == world.size
    return found
