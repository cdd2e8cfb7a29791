"""All ranks say what they are about to build, and go on only if they say the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from stretto.layout.ranks import by_value, named
from stretto.store import LostError, TimedStore, absent, combine
from stretto.world import World

AGREE, ABSENT = "agree", "absent: "

GRACE_SECONDS = 5.0
"""How much longer the others wait than rank 0, who knows who is missing."""


class AbsentError(LostError):
    """Some ranks did not come to build the groups."""


def check_same_plan(store: TimedStore, world: World, text: str, timeout: float) -> None:
    """Return when every rank of the world has published the same `text`; `timeout` is in seconds.

    A few messages for each rank, of which none grows with the world: the rank that comes last knows by one counter
    whether all say the same, and publishes the verdict, for which all wait. Rank 0 looks at the time.

    Raises:
        RuntimeError: on all ranks alike, the texts differ, with the ranks that say each; or some ranks did
            not arrive within `timeout`, with their numbers (`AbsentError`).
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if store.add(f"said/{digest}", 1) == 1:
        store.set(f"text/{digest}", text)
    store.set(f"digest/{world.rank}", digest)
    if combine(store.under("here"), world.rank, world.size, "") is not None:
        _publish(store, AGREE if store.add(f"said/{digest}", 0) == world.size else _differences(store, world.size))
    if world.rank == 0 and not store.poll("verdict", timeout):
        _publish(store, _absent(store, world.size, timeout))
    if not store.wait("verdict", timeout + GRACE_SECONDS):
        raise AbsentError(f"rank 0 of {world.size} did not come to build the process groups within {timeout:g} s")
    verdict = store.get("verdict").decode(errors="replace")
    if verdict.startswith(ABSENT):
        raise AbsentError(verdict.removeprefix(ABSENT))
    if verdict != AGREE:
        raise RuntimeError(verdict)


def _publish(store: TimedStore, verdict: str) -> None:
    """Only the first verdict counts, so that one who comes too late does not go on alone."""
    store.compare_set("verdict", "", verdict)


def _differences(store: TimedStore, size: int) -> str:
    digests = store.multi_get([f"digest/{rank}" for rank in range(size)])
    # The common list first: the others are what to look at.
    said = sorted(by_value(enumerate(digests)).items(), key=lambda item: -len(item[1]))[:8]
    lines = [f"  {named(ranks)}: {store.get(f'text/{digest.decode()}').decode()}" for digest, ranks in said]
    return "\n".join(
        ["the ranks do not agree on the groups to create:", *lines, "start all ranks with one configuration"]
    )


def _absent(store: TimedStore, size: int, timeout: float) -> str:
    return (
        f"{ABSENT}{named(absent(store.under('here'), size))} of {size} did not come to build the process groups "
        f"within {timeout:g} s; look at their output, or allow more time with timeout="
    )


@dataclass(frozen=True)
class BuildStore:
    """One build: its name, the same on all ranks and never used before, and its part of the store."""

    name: str
    store: Store


def build_store(world: World) -> BuildStore:
    """The place where the ranks of this world meet for one build.

    Back ends leave addresses in the store under the name of a group, so a group created again under the same
    name may be given the address of its closed predecessor. Every rank counts its own builds in the store:
    the n-th build of one rank meets the n-th of the others, and no process keeps a counter.
    """
    if world.store is None:
        raise ValueError(f"a world of {world.size} ranks has no store to meet at; make it with initialize()")
    members = hashlib.sha256(repr(world.ranks).encode()).hexdigest()[:12]
    store = PrefixStore(f"stretto/groups/{members}", world.store)
    number = TimedStore(store).add(f"builds/{world.rank}", 1)
    return BuildStore(f"{members}.{number}", PrefixStore(str(number), store))
