"""A rank, started by a launcher from its command line: joins, adds up, says where it is; then `sys.argv[1]`."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from stretto.initialize import initialize

with initialize(timeout=60, start_timeout=30) as world:
    x = torch.ones(1)
    dist.all_reduce(x)
    sys.stdout.write(f"{world.source}: rank {world.rank} of {world.size}, local {world.local_rank}: {x.item():.0f}\n")
    sys.stdout.flush()
    if sys.argv[1:] == ["raise"] and world.rank == 1:
        time.sleep(0.5)
        sys.stdout.write(f"raised at {time.monotonic()}\n")
        sys.stdout.flush()
        raise ValueError("the fault of rank 1")
    if sys.argv[1:] == ["raise"]:
        dist.barrier()
    if sys.argv[1:] == ["kill"]:
        time.sleep(1)  # the test hears of all
        if world.rank == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
    if sys.argv[1:] == ["restart"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and world.rank == 0:
        raise SystemExit(3)
