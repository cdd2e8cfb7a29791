"""Four ranks, of which one stops (SIGSTOP) in some phase; nothing tells the others, and no connection breaks."""

from __future__ import annotations

import os
import signal
from functools import partial

import torch
import torch.distributed as dist

from stretto.initialize import RendezvousError, failure_watch, initialize, process, roll_call
from stretto.launch.local import run_local
from stretto.layout import Layout
from stretto.parallel_state import ParallelState, state

TIMEOUT = 2.0


def halt(*_: object, **__: object) -> None:
    """Stop this process."""
    os.kill(os.getpid(), signal.SIGSTOP)


def rank(where: str, victim: int) -> int:
    try:
        return as_rank(where, victim)
    except RendezvousError:  # which the command tells once, from rank 0: nobody speaks where that is the one
        return 1


def as_rank(where: str, victim: int) -> int:
    mine = os.environ["RANK"] == str(victim)
    if mine and where == "rendezvous":
        process.rendezvous = halt  # type: ignore[assignment]
    if mine and where == "default group":
        process.default_group = halt  # type: ignore[assignment]
    if mine and where == "agreement":
        state.check_same_plan = halt
    if mine and where == "groups":
        state.create_group = halt  # type: ignore[assignment]
    with initialize(timeout=TIMEOUT, start_timeout=3 if where == "rendezvous" else 30) as world:
        with ParallelState.build(Layout.of(dp=2, tp=2), world, timeout=TIMEOUT) as built:
            dist.all_reduce(torch.ones(1), group=built.axis("tp").group)
            if mine and where == "collective":
                halt()
            dist.all_reduce(torch.ones(1), group=built.axis("dp").group)
        if mine and where == "after the last save":
            halt()
    if mine and where == "after all":
        halt()
    return 0


def main(where: str, victim: int) -> int:
    """With the time that ranks have to answer cut short, for the sake of the tests' own."""
    roll_call.ANSWER_SECONDS = failure_watch.END_SECONDS = 1.5
    return run_local(4, partial(rank, where, victim), grace=5.0)
