"""Copy engines carry what NCCL would: gathers and sums between all GPUs there are, whoever is late.

Each test repeats itself often enough that slots are used again, and lets ranks in turn be late or early: a slot that is
written while another rank reads it, or read before it is written, shows as wrong numbers.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import pytest
import torch

from stretto.collectives import all_gather, all_to_all_rows_async, reduce_scatter, reduce_scatter_rows_async
from stretto.copy_engine import LEAST
from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, ParallelState
from stretto.peer_buffer import SLOTS
from stretto.testing import Pool
from stretto.world import Axis, RowSplits, World

GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")]

ROWS, WIDTH = 96, 4096
LARGEST = ROWS * WIDTH * 8


def build(world: World) -> ParallelState:
    options = {"tp": GroupOptions(peer_buffer=LARGEST)}
    return ParallelState.build(Layout.of(tp=world.size), world, timeout=60, options=options)


def late(world: World, n: int) -> None:
    """Every rank in its turn is busy for a millisecond or so first."""
    if n % (world.size + 1) == world.rank:
        torch.cuda._sleep(2_000_000)


def numbers(axis: Axis, n: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole ones: sums are exact."""
    generator = torch.Generator("cuda").manual_seed(n * axis.size + axis.rank)
    return torch.randint(-8, 8, (rows, WIDTH), device="cuda", generator=generator).to(dtype)


def as_nccl_has_it(world: World) -> None:
    with build(world) as state:
        axis = state.axis("tp")
        assert axis.peer_buffer is not None
        plain = replace(axis, peer_buffer=None)
        for n in range(8 * SLOTS):
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                rows = ROWS - 8 * (n % 3)
                x = numbers(axis, n, rows, dtype)
                late(world, n)
                assert torch.equal(all_gather(x, axis), all_gather(x, plain))
                whole = numbers(axis, n, axis.size * rows, dtype)
                before = whole.clone()
                late(world, n + 1)
                assert torch.equal(reduce_scatter(whole, axis), reduce_scatter(whole, plain))
                assert torch.equal(whole, before)


def test_gathers_and_sums_are_those_of_nccl(gpus: Pool) -> None:
    gpus.run(GPUS, as_nccl_has_it)


def uneven(world: World) -> None:
    """Rows by the sizes of a step of routing, there and back, among them of ranks that send or get nothing."""
    with build(world) as state:
        axis = state.axis("tp")
        plain = replace(axis, peer_buffer=None)
        for n in range(8 * SLOTS):
            generator = torch.Generator().manual_seed(n)
            pairs = torch.randint(0, ROWS // 2, (axis.size, axis.size), generator=generator)
            pairs[n % axis.size, (n // 2) % axis.size :] = 0
            there = RowSplits.of_pairs(pairs.tolist(), axis.rank)
            for splits in (there, there.back):
                x = numbers(axis, n, sum(splits.sent), torch.bfloat16)
                late(world, n)
                for order in (None, torch.randperm(len(x), device=x.device)):
                    got = all_to_all_rows_async(x, splits, axis, order).wait()
                    assert torch.equal(got, all_to_all_rows_async(x, splits, plain, order).wait())


def test_uneven_rows_are_those_of_nccl(gpus: Pool) -> None:
    gpus.run(GPUS, uneven)


def many_at_once(world: World) -> None:
    """More messages than slots are begun before the first is taken, products between them."""
    with build(world) as state:
        axis = state.axis("tp")
        plain = replace(axis, peer_buffer=None)
        assert axis.peer_buffer is not None
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        for n in range(20):
            xs = [numbers(axis, 10 * n + k, ROWS, torch.float32) for k in range(2 * SLOTS)]
            late(world, n)
            coming = []
            for x in xs:
                coming.append(axis.peer_buffer.gather(x))
                a @ a
            got = [message.wait() for message in coming]
            for x, whole in zip(xs, got, strict=True):
                assert torch.equal(whole, all_gather(x, plain))


def test_more_messages_than_slots_under_way(gpus: Pool) -> None:
    gpus.run(GPUS, many_at_once)


def in_parts(world: World) -> None:
    with build(world) as state:
        axis = state.axis("tp")
        plain = replace(axis, peer_buffer=None)
        for n in range(4 * SLOTS):
            whole = numbers(axis, n, axis.size * ROWS, torch.float32)
            parts, asked = whole.chunk(axis.size), list[int]()

            def rows(to: int, out: torch.Tensor | None, n=n, parts=parts, asked=asked) -> torch.Tensor:
                asked.append(to)
                late(world, n + to)
                return parts[to] if out is None else out.copy_(parts[to])

            assert torch.equal(reduce_scatter_rows_async(rows, whole, axis).wait(), reduce_scatter(whole, plain))
            assert asked == [(axis.rank + k) % axis.size for k in range(1, axis.size + 1)]


def test_a_sum_leaves_in_parts_those_of_others_first(gpus: Pool) -> None:
    gpus.run(GPUS, in_parts)


def small_and_large(world: World) -> None:
    with build(world) as state:
        axis = state.axis("tp")
        assert axis.peer_buffer is not None
        assert not axis.peer_buffer.takes(LEAST - 1)
        assert not axis.peer_buffer.takes(LARGEST + 1)
        x = torch.ones(3, device="cuda") * axis.rank
        assert all_gather(x, axis).tolist() == [float(r) for r in range(axis.size) for _ in range(3)]


def test_what_is_too_small_or_too_large_goes_through_nccl(gpus: Pool) -> None:
    gpus.run(GPUS, small_and_large)


def left_behind(world: World, peer_buffer: int | None) -> int:
    """Bytes of the device that two states take with them when they go; NCCL keeps some of its own."""
    free = []
    for _ in range(3):
        options = {"tp": GroupOptions(peer_buffer=peer_buffer)}
        with ParallelState.build(Layout.of(tp=world.size), world, timeout=60, options=options) as state:
            all_gather(numbers(state.axis("tp"), 0, ROWS, torch.float32), state.axis("tp"))
            torch.cuda.synchronize()
        del state
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    return free[0] - free[-1]


def test_a_state_takes_its_window_with_it(gpus: Pool) -> None:
    size = 2**26
    without = max(gpus.run(GPUS, left_behind, None))
    assert max(gpus.run(GPUS, left_behind, size)) <= without + size // 4


def fail_with_a_message_under_way(world: World) -> float:
    start = time.monotonic()
    try:
        with build(world) as state:
            if world.rank == 0:
                all_gather(numbers(state.axis("tp"), 0, ROWS, torch.float32), state.axis("tp"))
                raise LookupError("out of luck")  # while the stream waits for peers that never come
            time.sleep(2)
            raise LookupError("out of luck too")
    except LookupError:
        torch.cuda.synchronize()
        return time.monotonic() - start


def test_a_failing_rank_leaves_while_a_message_is_under_way(gpus: Pool) -> None:
    assert all(seconds < 12 for seconds in gpus.run(GPUS, fail_with_a_message_under_way))
