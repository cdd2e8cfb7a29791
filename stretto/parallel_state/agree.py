"""All ranks say what they are about to build, and go on only if they say the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]

from stretto.world import World

AGREE = "agree"


def agree(store: Store, world: World, text: str, timeout: float) -> None:
    """Return when every rank of the world has published the same `text`; `timeout` is in seconds.

    One message per rank and one reader: the rank that arrives last compares the digests and publishes the
    verdict, so the cost to the store grows with the world and not with its square.

    Raises:
        RuntimeError: on all ranks alike, the texts differ, with the ranks that say each; or some ranks did
            not arrive within `timeout`, with their numbers.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    store.set(f"text/{digest}", text)
    store.set(f"digest/{world.rank}", digest)
    if store.add("arrived", 1) == world.size:
        _publish(store, _compare(store, world.size))
    try:
        store.wait(["verdict"], timedelta(seconds=timeout))
    except DistStoreError:
        _publish(store, _absent(store, world.size, timeout))
    verdict = store.get("verdict").decode()
    if verdict != AGREE:
        raise RuntimeError(verdict)


def _publish(store: Store, verdict: str) -> None:
    """Only the first verdict counts, so that one who comes too late does not go on alone."""
    store.compare_set("verdict", "", verdict)


def _compare(store: Store, size: int) -> str:
    digests = store.multi_get([f"digest/{rank}" for rank in range(size)])
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for rank, digest in enumerate(digests):
        by_digest[digest].append(rank)
    if len(by_digest) == 1:
        return AGREE
    # The common list first: the others are what to look at.
    said = sorted(by_digest.items(), key=lambda item: -len(item[1]))
    lines = [f"  {_ranks(ranks)}: {store.get(f'text/{digest.decode()}').decode()}" for digest, ranks in said]
    return "\n".join(
        ["the ranks do not agree on the groups to create:", *lines, "start all ranks with one configuration"]
    )


def _absent(store: Store, size: int, timeout: float) -> str:
    absent = [rank for rank in range(size) if not store.check([f"digest/{rank}"])]
    return (
        f"{_ranks(absent)} of {size} did not come to build the process groups within {timeout:g} s; look at their "
        f"output, or allow more time with timeout="
    )


def _ranks(ranks: Iterable[int], most: int = 16) -> str:
    ranks = list(ranks)
    shown = ", ".join(map(str, ranks[:most])) + (f", .. ({len(ranks)} in all)" if len(ranks) > most else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


@dataclass(frozen=True)
class Meeting:
    """One build: its name, the same on all ranks and never used before, and its part of the store."""

    name: str
    store: Store


def meet(world: World) -> Meeting:
    """The place where the ranks of this world meet for one build.

    Back ends leave addresses in the store under the name of a group, so a group created again under the same
    name may be given the address of its closed predecessor. Every rank counts its own builds in the store:
    the n-th build of one rank meets the n-th of the others, and no process keeps a counter.
    """
    if world.store is None:
        raise ValueError(f"a world of {world.size} ranks has no store to meet at; make it with initialize()")
    members = hashlib.sha256(repr(world.ranks).encode()).hexdigest()[:12]
    store = PrefixStore(f"stretto/groups/{members}", world.store)
    number = store.add(f"builds/{world.rank}", 1)
    return Meeting(f"{members}.{number}", PrefixStore(str(number), store))
