"""Messages of a pipeline by copy engines, between GPUs: those of NCCL, whoever is late."""

from __future__ import annotations

import time

import pytest
import torch

from stretto.copy_engine import LEAST
from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, ParallelState
from stretto.peer_messages import SLOTS
from stretto.pipeline_parallel import Link, TensorMeta
from stretto.testing import Pool
from stretto.world import World

GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")]

LARGEST = 2**26


def build(world: World) -> ParallelState:
    pairs = [f"pp:{n}>{n + 1}" for n in range(world.size - 1)]
    options = dict.fromkeys(pairs, GroupOptions(peer_messages=LARGEST))
    return ParallelState.build(Layout.of(pp=world.size), world, timeout=60, options=options)


def number(n: int, size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float32, device="cuda") + n


def there_and_back(world: World) -> tuple[int, float]:
    """Each rank sends to both neighbours; GEMMs between; memory is used again at once. Messages by copy engines, and
    the largest error."""
    worst = torch.zeros((), device="cuda")
    with build(world) as state:
        link = Link.between(state.axis("pp"), world.device, state.axis)
        near = [r for r in (world.rank - 1, world.rank + 1) if 0 <= r < world.size]
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # the host must not wait for the device
        try:
            for n in range(16 * SLOTS):
                if n % (world.size + 1) == world.rank:
                    torch.cuda._sleep(2_000_000)
                size = (LEAST // 4, LARGEST // 4, 17)[n % 3]
                coming = [link.recv(TensorMeta((size,), torch.float32), r) for r in near]
                for r in near:
                    link.send(number(100 * n + 10 * world.rank + r, size), r)
                a @ a
                for r, message in zip(near, coming, strict=True):
                    want = number(100 * n + 10 * r + world.rank, size)
                    worst = torch.maximum(worst, (message.wait() - want).abs().max())
            link.drain()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        by = [pair.peer_messages for pair in link.pairs.values() if pair.peer_messages is not None]
        return sum(each._sent + each._received for each in by), float(worst)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_messages_come_whole_and_the_host_waits_for_none(gpus: Pool) -> None:
    for rank, (went, worst) in enumerate(gpus.run(GPUS, there_and_back, timeout=120)):
        near = 1 if rank in (0, GPUS - 1) else 2
        assert went == 2 * near * sum(n % 3 != 2 for n in range(16 * SLOTS))
        assert worst == 0


def fail_with_a_message_under_way(world: World) -> float:
    start = time.monotonic()
    try:
        with build(world) as state:
            link = Link.between(state.axis("pp"), world.device, state.axis)
            if world.rank == 0:
                link.recv(TensorMeta((LEAST,), torch.float32), 1).wait()
                raise LookupError("out of luck")  # while the stream waits for a message that never comes
            time.sleep(2)
            raise LookupError("out of luck too")
    except LookupError:
        torch.cuda.synchronize()
        return time.monotonic() - start


def test_a_failing_rank_leaves_while_a_message_is_under_way(gpus: Pool) -> None:
    assert all(seconds < 12 for seconds in gpus.run(GPUS, fail_with_a_message_under_way))
