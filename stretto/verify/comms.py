"""What a training step of a layout communicates: recorded on every rank, held against the others and the textbook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stretto.arguments.schema import Arguments
from stretto.collective_trace import CollectiveCall, Divergence, Recorder, Volume, divergences, volumes
from stretto.collective_trace.call import decode, encode
from stretto.exchange import all_gather_bytes
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.train.build import build
from stretto.train.groups import state_of
from stretto.verify.session import Session, random_batch
from stretto.verify.textbook import expected, padding, routed
from stretto.verify.textbook_experts import EXCHANGE
from stretto.world import World

ROUNDING = 1e-9
"""Of sums of fractions of bytes, relative."""


@dataclass(frozen=True)
class Sent:
    """What a rank sends over an axis by one operation in a step, and what the textbook says that it should."""

    axis: str
    op: str
    rank: int
    measured: Volume
    textbook: float
    off: tuple[int, ...]
    """Ranks that do not send what the textbook says, padding aside; `rank` is the first of them, or who sends most."""
    sites: tuple[tuple[str, int], ...] = ()
    """Where it is not what it should be: who in the program asked for it on `rank`, and for how many calls."""


@dataclass(frozen=True)
class Communication:
    """One training step of a layout."""

    calls: int
    """Of all ranks together."""
    orthogonalizing: Volume
    """What the rank that sends most for it exchanges for Muon's matrices: it depends on who owns them, no textbook."""
    sent: tuple[Sent, ...]
    divergences: tuple[Divergence, ...]

    @property
    def right(self) -> bool:
        """The ranks of each group do the same, and send what the textbook says."""
        return not self.divergences and not any(sent.off for sent in self.sent)


def record_step(args: Arguments, layout: Layout, world: World, *, seed: int = 0) -> dict[int, list[CollectiveCall]]:
    """The calls of one optimizer step from random tokens, by rank; empty on all ranks but 0. `args` fit the layout.

    It is the second step: in the first, stages also announce to each other what they will send.
    """
    recorder = Recorder()
    with state_of(args, layout, world, tracer=recorder) as state:
        built = build(args, state)
        try:
            session = Session(args, state, built)
            for step in range(2):
                recorder.clear()
                built.stepper.step(session.microbatches(random_batch(args, seed + step)), args.optimizer.lr)
        finally:
            built.weights.close()
        return _gather(recorder.calls, state)


def communication(args: Arguments, layout: Layout, records: Mapping[int, Sequence[CollectiveCall]]) -> Communication:
    """Judge the records of all ranks. Raises NotImplementedError where there is no textbook, see `expected`."""
    judged = {rank: [c for c in calls if not _orthogonalizes(c)] for rank, calls in records.items()}
    measured = {rank: volumes(calls) for rank, calls in judged.items()}
    textbook = {rank: expected(args, layout, rank) for rank in records}
    slack = {rank: padding(args, layout, rank) for rank in records}
    keys = sorted({key for rank in records for key in (*measured[rank], *textbook[rank])})
    sent = []
    for key in keys:
        own = {rank: measured[rank].get(key, Volume()) for rank in records}
        should = {rank: textbook[rank].get(key, 0.0) for rank in records}
        more = {rank: own[rank].bytes - should[rank] for rank in records}
        flat = key[1] != "all_reduce_max"
        may = {rank: (0.0, slack[rank].get(key[0], 0.0) if flat else 0.0) for rank in records}
        if key == EXCHANGE:
            may = {rank: routed(args, layout, rank) for rank in records}
        off = tuple(
            r for r in records if not -may[r][0] - ROUNDING * should[r] <= more[r] <= may[r][1] + ROUNDING * should[r]
        )
        rank = off[0] if off else max(records, key=lambda r: own[r].bytes)
        sites = Counter(call.site for call in judged[rank] if (call.axis, call.op) == key) if off else Counter()
        sent.append(Sent(*key, rank, own[rank], should[rank], off, tuple(sites.most_common())))
    of_muon = [[c for c in calls if _orthogonalizes(c)] for calls in records.values()]
    most = max((Volume(len(calls), sum(c.bytes for c in calls)) for calls in of_muon), key=lambda v: v.bytes)
    return Communication(sum(map(len, records.values())), most, tuple(sent), divergences(records))


def _orthogonalizes(call: CollectiveCall) -> bool:
    return "muon.py:" in call.site


def _gather(calls: list[CollectiveCall], state: ParallelState) -> dict[int, list[CollectiveCall]]:
    world = state.axis("tp", "cp", "dp", "pp")
    everyone = all_gather_bytes(encode(calls).encode(), world.size, world.group)
    return {rank: decode(text) for rank, text in enumerate(everyone)} if world.rank == 0 else {}
