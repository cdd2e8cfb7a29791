"""Ranks that succeed or fail together.

A rank that raises while the others wait in a collective is a hang. So each part of a save or load that can
fail on one rank alone runs inside `on_all_ranks`: all ranks learn of all failures before any of them goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from stretto.checkpoint.errors import CheckpointError, describe
from stretto.exchange import all_gather_bytes, all_same, gather_json
from stretto.layout.ranks import by_value, named
from stretto.world import World


@dataclass(frozen=True)
class Peers:
    """The ranks of one save or load. `group` None with size 1 needs no process group at all."""

    rank: int
    size: int
    group: ProcessGroup | None

    @classmethod
    def of(cls, world: World, group: ProcessGroup | None) -> Peers:
        """The ranks of `world`, talking over `group` (None: torch's default group).

        Raises:
            ValueError: the group does not hold exactly the ranks of the world.
        """
        if world.size == 1:
            return cls(0, 1, None)
        size = dist.get_world_size(group)
        if size != world.size:
            raise ValueError(
                f"the world has {world.size} ranks but the process group {size}: "
                "pass group=, the group that spans exactly the ranks of the world"
            )
        return cls(dist.get_rank(group), size, group)

    @property
    def alone(self) -> bool:
        """Whether this process is the only one: no collective is needed."""
        return self.size == 1

    def gather(self, mine: str | None) -> list[str | None]:
        """Every rank's value, on every rank; over the CPU back end where the group has one.

        Mostly all have the same, and then no more than that is asked.
        """
        data = json.dumps(mine).encode()
        if all_same(data, self.size, self.group):
            return [mine] * self.size
        said = all_gather_bytes(data, self.size, self.group)
        return [json.loads(text) for text in said]

    def collect(self, mine: Any) -> list[Any] | None:
        """Every rank's value, what JSON can say, on rank 0; None on the others."""
        return gather_json(mine, self.rank, self.size, self.group)

    def require_same(self, what: str, mine: str) -> None:
        """Raise on every rank unless all ranks say the same."""
        if len(set(values := self.gather(mine))) > 1:
            raise CheckpointError(f"ranks name different {what} {values}: let rank 0 choose, and tell the others")

    @contextmanager
    def on_all_ranks(self, doing: str) -> Iterator[None]:
        """Run a body without collectives; it ends on all ranks, or raises one `CheckpointError` on all ranks.

        `doing` is the sentence's start: "saving step 3 to /ckpt".
        """
        problem, cause = None, None
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it is, the others must hear of it
            problem, cause = describe(error), error
        problems = self.gather(problem)
        if any(p is not None for p in problems):
            raise CheckpointError(_report(doing, dict(enumerate(problems)))) from cause

    def wait_for_all(self, doing: str, done: Callable[[float], bool]) -> None:
        """Ask `done(seconds)`, which waits so long at most, until it is true on all ranks; together.

        Raises one `CheckpointError` on all ranks as soon as it raises on any, though others would wait for ever.
        """
        pause, cause = 0.0, None
        while True:
            try:
                state = "done" if done(pause) else "waiting"
            except CheckpointError as error:
                state, cause = f"failed {error}", error
            said = [each or "" for each in self.gather(state)]
            failed = {rank: each.removeprefix("failed ") for rank, each in enumerate(said) if each[:7] == "failed "}
            if failed:
                raise CheckpointError(_report(doing, dict(failed))) from cause
            if set(said) == {"done"}:
                return
            pause = min(max(2 * pause, 0.01), 0.5)


def _report(doing: str, problems: Mapping[int, str | None]) -> str:
    """One message for all ranks: each distinct problem once, with the ranks that have it."""
    ranks = by_value((rank, problem) for rank, problem in sorted(problems.items()) if problem is not None)
    lines = [f"{named(who)}: {problem}" for problem, who in ranks.items()]
    return f"{doing} failed\n" + "\n".join(lines)
