"""Programs of four ranks, each with one fault on rank 2 (or as named), for the tests to run as programs of their own.

What is marked `# guilty` is the line that the table must name.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stretto.collective_trace import Checker, LastCalls
from stretto.collectives import all_gather, all_reduce, all_reduce_
from stretto.initialize import initialize
from stretto.initialize.failures import is_consequence
from stretto.launch.local import run_local
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Link, TensorMeta
from stretto.world import Axis, World

TIMEOUT = 5.0


def right(axis: Axis) -> None:
    x = torch.ones(8)
    for _ in range(3):
        x = all_reduce(x, axis)
    all_reduce_(all_gather(x, axis), axis).wait()


def missing_call(axis: Axis) -> None:
    x = torch.ones(8)
    for step in range(3):
        if axis.rank != 2 or step != 1:
            x = all_reduce(x, axis)
        all_gather(x, axis)  # guilty


def missing_last_call(axis: Axis) -> None:
    x = torch.ones(8)
    for step in range(3):
        if axis.rank != 2 or step != 2:
            x = all_reduce(x, axis)  # guilty


def swapped_order(axis: Axis) -> None:
    x = torch.ones(8)
    if axis.rank == 2:
        all_gather(x, axis)  # guilty
        all_reduce(x, axis)
    else:
        all_reduce(x, axis)
        all_gather(x, axis)


def wrong_shape(axis: Axis) -> None:
    all_reduce(torch.ones(8), axis)
    x = torch.ones(9 if axis.rank == 2 else 8)
    all_reduce(x, axis)  # guilty


def wrong_dtype(axis: Axis) -> None:
    all_reduce(torch.ones(8), axis)
    x = torch.ones(8, dtype=torch.float64 if axis.rank == 2 else torch.float32)
    all_reduce_(x, axis).wait()  # guilty


def rank_0_only(axis: Axis) -> None:
    x = all_gather(torch.ones(8), axis)
    if axis.rank == 0:
        all_reduce(x, axis)  # guilty
    all_gather(x, axis)


def raising(axis: Axis) -> None:
    all_reduce(torch.ones(8), axis)
    if axis.rank == 2:
        raise ZeroDivisionError("no tokens")  # guilty
    all_reduce(torch.ones(8), axis)


def stopped(axis: Axis) -> None:
    all_reduce(torch.ones(8), axis)  # guilty
    if axis.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    all_gather(torch.ones(8), axis)


def stopped_in_a_chain(state: ParallelState) -> None:
    """tp groups 0-1 and 2-3, dp groups 0-2 and 1-3: rank 3 waits for 2 over tp, 1 for 3 over dp, 0 for 1 over tp."""
    tp, dp = state.axis("tp"), state.axis("dp")
    x = torch.ones(8)
    all_reduce(x, tp)
    rank = state.world.rank
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank in (2, 3):
        all_reduce(x, tp)
    else:
        time.sleep(0.3 if rank == 1 else 0)
    if rank in (1, 3):
        all_reduce(x, dp)
    all_reduce(x, tp)


def busy(axis: Axis) -> None:
    all_reduce(torch.ones(8), axis)  # guilty
    while axis.rank == 2:
        time.sleep(0.1)
    all_gather(torch.ones(8), axis)


def dead(axis: Axis) -> None:
    all_reduce(torch.ones(8), axis)  # guilty
    if axis.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    all_gather(torch.ones(8), axis)


def wrong_message(axis: Axis) -> None:
    link = Link(axis, torch.device("cpu"))
    if axis.rank == 1:
        link.send(torch.ones(4), 2)
    if axis.rank == 2:
        link.recv(TensorMeta((5,), torch.float32), 1).wait()  # guilty
    all_reduce(torch.ones(8), axis)


@dataclass(frozen=True)
class Work:
    program: Callable[[Axis], None] | Callable[[ParallelState], None]
    checked: bool
    sizes: tuple[int, int] = (1, 4)
    """tp and dp; a program of several axes gets the state."""

    def __call__(self) -> int:
        with initialize(device="cpu", timeout=30.0) as world:
            self.run(world)
        return 0

    def run(self, world: World) -> None:
        tp, dp = self.sizes
        tracer = Checker(TIMEOUT) if self.checked else LastCalls(is_consequence)
        timeout = 30.0 if self.checked else TIMEOUT
        with ParallelState.build(Layout.of(tp=tp, dp=dp), world, timeout=timeout, tracer=tracer) as state:
            self.program(state.axis("dp") if tp == 1 else state)  # type: ignore[arg-type]


def main(program: Callable[[Axis], None], checked: bool, sizes: tuple[int, int] = (1, 4)) -> int:
    return run_local(4, Work(program, checked, sizes))
