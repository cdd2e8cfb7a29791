"""Saying once, not once per rank, why a run cannot be."""

from __future__ import annotations

import time

from stretto.initialize.environment import Launch
from stretto.terminal import say

PATIENCE = 3.0
"""Seconds that other ranks leave rank 0 to speak. A launcher ends them sooner, once rank 0 has ended."""


def reject(
    problem: object, launch: Launch, *, command: str = "stretto train", code: int = 2, every: bool = False
) -> int:
    """Print what is wrong, without traceback, and return the exit code.

    Ranks that could not talk yet have most likely found the same. So rank 0 speaks at once. The others wait first:
    ended earlier than rank 0, they would have the launcher end it before it has spoken. Then one on each other node
    speaks, as what is wrong may be that node's alone; with `every` each rank does, as nobody can speak for all.
    """
    if launch.rank:
        time.sleep(PATIENCE)
    if launch.local_rank == 0 or every:
        where = f" (rank {launch.rank})" if launch.rank else ""
        said = f"{problem}".removeprefix(f"rank {launch.rank}: ") if where else problem
        say(f"{command}{where}: {said}")
    return code
