"""Programs of local ranks: `main(what, nproc)` runs one of the functions below as ranks, and returns as they do."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import Process

import torch
import torch.distributed as dist

from stretto.initialize import initialize
from stretto.initialize.stop import HEARD
from stretto.launch.local import run_local
from stretto.world import World


def add(world: World) -> int:
    x = torch.ones(1)
    dist.all_reduce(x)
    if world.rank == 0:
        print(f"sum {x.item():.0f} source {world.source} device {world.device} threads {torch.get_num_threads()}")
    return 0


def place(world: World) -> int:
    print(f"rank {world.rank} of {world.size}, by {world.source}")
    return 0


def twice(world: World) -> int:
    return add(world)


def raise_on_one(world: World) -> int:
    if world.rank == 1:
        raise ValueError("the fault of rank 1")
    dist.barrier()
    return 0


def raise_on_two(world: World) -> int:
    if world.rank == 2:
        time.sleep(0.3)  # the others wait by now
        raise ValueError("the fault of rank 2")
    dist.barrier()
    return 0


def raise_while_others_compute(world: World) -> int:
    if world.rank == 2:
        raise ValueError("the fault of rank 2")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
    return 0


def raise_while_another_is_stuck(world: World) -> int:
    """Rank 0 is in a wait that no broken connection ends, as in a collective of NCCL."""
    if world.rank == 1:
        raise ValueError("the fault of rank 1")
    time.sleep(600)
    return 0


def killed(world: World) -> int:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return 0


def usage(world: World) -> int:
    return 2


def nothing(world: World) -> None:
    """Not an exit code: an error, and not a way out of the fork."""


def count_signals(world: World) -> int:
    assert os.getpgrp() == os.getpid(), "in the group that a terminal sends signals to"
    seen: list[int] = []
    for number in HEARD:
        signal.signal(number, lambda n, _: seen.append(n))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not seen:
        time.sleep(0.01)
    time.sleep(0.3)  # a second delivery would come now
    sys.stdout.write(f"rank {world.rank} saw {[signal.Signals(n).name for n in seen]}\n")
    return 0


def orphan(world: World) -> int:
    if world.rank == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
    return 0


def children(world: World) -> int:
    """Programs that a rank runs end with their own codes, whatever the parent does with its children."""
    return subprocess.run([sys.executable, "-c", "raise SystemExit(0)"], check=False).returncode


def main(what: str, nproc: int) -> int:
    return run_local(nproc, partial(rank, what))


def by_hand(what: str, number: int, port: int) -> int:
    """One of two ranks, as a launcher starts it that neither watches nor ends its processes."""
    os.environ.update(RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return rank(what)


def both_by_hand(what: str, port: int) -> int:
    """Two processes without a launcher; 0 when both have failed."""
    ranks = [Process(target=by_hand, args=(what, number, port)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return sum(process.exitcode == 0 for process in ranks)


def rank(what: str) -> int:
    with initialize(timeout=60, start_timeout=30) as world:
        code: int = globals()[what](world)
    if what == "twice":
        with initialize(timeout=60, start_timeout=30) as again:
            return twice(again)
    return code
