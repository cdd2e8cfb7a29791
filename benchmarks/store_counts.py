"""What a start and an end of many ranks cost the rendezvous store: messages and bytes, without any process.

    python -m benchmarks.store_counts [RANKS ...] [--json FILE]

Every rank runs the program's own code over a store that counts. A rank that would wait is put aside and run again when
the key is there, its earlier requests answered from memory. What back ends ask of the store to connect their groups is
not in it, nor what torch's own default group does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from stretto.collective_trace import LastCalls
from stretto.initialize.environment import Launch
from stretto.initialize.failure_watch import Ours, next_event
from stretto.initialize.rendezvous import check_in, goodbye
from stretto.initialize.roll_call import introduce
from stretto.initialize.timeline import StartTimeline
from stretto.parallel_state.same_plan import check_same_plan
from stretto.store import TimedStore
from stretto.world import Axis, World

SIZES = (64, 512, 4096, 16_384)


class WaitsError(Exception):
    """This rank waits for a key."""


@dataclass
class Count:
    """Requests of one rank, and bytes of keys and values both ways."""

    messages: int = 0
    bytes: int = 0


@dataclass
class Replay:
    """The answers that one rank has had, given again from the start when it goes on."""

    answers: list[Any] = field(default_factory=list)
    given: int = 0


class Counting(TimedStore):
    """A store as one rank sees it. A wait is one request: the server answers when it is time."""

    def __init__(self, values: dict[str, bytes], count: Count, replay: Replay, prefix: str = "") -> None:
        self.values, self.count, self.replay, self.prefix = values, count, replay, prefix

    def under(self, prefix: str) -> Counting:
        return Counting(self.values, self.count, self.replay, f"{self.prefix}{prefix}/")

    def _ask(self, keys: Sequence[str], answer: Callable[[], Any], sent: int = 0) -> Any:
        replay = self.replay
        if replay.given == len(replay.answers):
            got = answer()
            replay.answers.append(got)
            size = sum(map(len, got)) if isinstance(got, list) else len(got) if isinstance(got, bytes) else 8
            self.count.messages += 1
            self.count.bytes += sum(len(self.prefix) + len(key) for key in keys) + sent + size
        replay.given += 1
        return replay.answers[replay.given - 1]

    def set(self, key: str, value: str) -> None:
        self._ask([key], lambda: self.values.__setitem__(self.prefix + key, value.encode()), len(value))

    def get(self, key: str) -> bytes:
        return cast(bytes, self._ask([key], lambda: self.values[self.prefix + key]))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return cast(list[bytes], self._ask(keys, lambda: [self.values[self.prefix + key] for key in keys]))

    def add(self, key: str, amount: int) -> int:
        def add() -> int:
            now = int(self.values.get(self.prefix + key, b"0")) + amount
            self.values[self.prefix + key] = b"%d" % now
            return now

        return cast(int, self._ask([key], add))

    def check(self, keys: Sequence[str]) -> bool:
        return cast(bool, self._ask(keys, lambda: all(self.prefix + key in self.values for key in keys)))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:  # noqa: ARG002  # always "": nobody before
        set_ = lambda: self.values.setdefault(self.prefix + key, desired.encode())  # noqa: E731
        return cast(bytes, self._ask([key], set_, len(desired)))

    def wait(self, key: str, seconds: float) -> bool:  # noqa: ARG002  # no time passes here
        def there() -> bool:
            if self.prefix + key not in self.values:
                raise WaitsError
            return True

        return cast(bool, self._ask([key], there))

    poll = wait


def start(store: TimedStore, rank: int, size: int) -> None:
    """What a rank says and hears until the first step is done."""
    launch = Launch("test", rank, size, agent_store=True)
    check_in(store, launch, time.monotonic() + 60, 60.0)
    introduce(store, rank)
    world = _world(store, rank, size)
    check_same_plan(store.under("groups"), world, "tp8-cp1-dp128-pp16 on gloo, 600 s, groups " + "tp dp pp " * 20, 60.0)
    timeline = StartTimeline()
    timeline.seconds = dict.fromkeys(("imports", "data", "rendezvous", "groups", "model", "first step"), 0.001 * rank)
    timeline.gather(world)


def end(store: TimedStore, rank: int, size: int) -> None:
    """What a rank says and hears from the last step on."""
    calls = LastCalls(lambda _: False)
    calls.attach(_world(store, rank, size), store.under("watch"))  # type: ignore[arg-type]
    everyone = tuple(range(size))
    for _ in range(100):
        axis = Axis("tp-cp-dp-pp", rank, everyone, observer=calls.group("tp-cp-dp-pp", "tp-cp-dp-pp", everyone))
        assert axis.observer is not None
        axis.observer(axis, "all_reduce", torch.empty(4, device="meta"))
    calls.close()
    ours = Ours(store, rank, size, lambda: "", "rank 0")
    ours.told.set()  # by its watching thread, whose request is the next
    ours.end()
    next_event(store, 0)
    goodbye(store, rank, size, 0, serves=rank == 0)


def _world(store: TimedStore, rank: int, size: int) -> World:
    return World(rank, size, 0, 8, torch.device("cpu"), "gloo", range(size), store)  # type: ignore[arg-type]


def counts(body: Callable[[TimedStore, int, int], None], size: int) -> list[Count]:
    """Of each rank. They come in an order of no meaning, rank 0 among the first: it has the most to wait for."""
    values: dict[str, bytes] = {}
    stores = [Counting(values, Count(), Replay()) for _ in range(size)]
    waiting = sorted(range(size), key=lambda rank: rank * 7919 % size)
    done = -1
    while waiting:
        if done == (done := sum(store.count.messages for store in stores)):
            raise RuntimeError(f"ranks {waiting[:8]} wait for ever")
        still = []
        for rank in waiting:
            stores[rank].replay.given = 0
            try:
                body(stores[rank], rank, size)
            except WaitsError:
                still.append(rank)
        waiting = still
    return [store.count for store in stores]


@dataclass(frozen=True)
class Line:
    """One case at one size: of rank 0, of the busiest other rank, of a mean one, and of all together."""

    case: str
    ranks: int
    rank_0: Count
    most: Count
    mean: Count
    total: Count


def measure(case: str, size: int) -> Line:
    """Run a case."""
    found = counts(CASES[case], size)
    total = Count(sum(c.messages for c in found), sum(c.bytes for c in found))
    most = Count(max(c.messages for c in found[1:]), max(c.bytes for c in found[1:]))
    mean = Count(round(total.messages / size), round(total.bytes / size))
    return Line(case, size, found[0], most, mean, total)


def main(argv: Sequence[str]) -> int:
    """Print the table of docs/initialize.md; with --json keep the figures as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", type=int, nargs="*", default=SIZES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    lines = [measure(case, size) for case in CASES for size in args.ranks]
    sys.stdout.write(table(lines))
    if args.json:
        args.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    return 0


def table(lines: Sequence[Line]) -> str:
    """As it stands in the documents."""
    head = "| | ranks | rank 0 | busiest other rank | mean rank | all |\n|---|---|---|---|---|---|\n"
    return head + "".join(
        f"| {line.case} | {line.ranks:,} | {_cell(line.rank_0)} | {_cell(line.most)} | {_cell(line.mean)} | "
        f"{line.total.bytes / 2**20:.1f} MiB |\n"
        for line in lines
    )


def _cell(count: Count) -> str:
    return f"{count.messages}, {count.bytes / 1000:.1f} kB"


CASES = {"start": start, "end": end}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
