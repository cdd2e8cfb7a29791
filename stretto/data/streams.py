"""How a run goes on with another mix of corpora: each corpus where it was left, in the same order.

The samples of one corpus are a *stream*: sample j of it is window `permute(j mod n)` in epoch `j div n`, with a seed
that the stream keeps for the whole run, whatever its share. A *stretch* is the part of a run over which the mix does
not change; it begins after `begun` samples of the run, and knows how many samples each stream has had by then. So
sample k of a run is a function of the seed, k and the stretch that it is in, and no window comes twice in an epoch of
its corpus because the mix has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from stretto.data.errors import DataError

Taken = tuple[int, ...]
"""Samples of each corpus that a run has had."""

_MOST: Final = 10_000
"""Corpora that a run may have had; a larger number is damage."""


@dataclass(frozen=True)
class Stream:
    """The samples of one corpus."""

    path: str
    digest: str
    number: int | None
    """Corpora that take turns are numbered as they come into the run; None for one that a run began with alone."""
    had: int = 0
    """Samples of it that the run had when the stretch began."""

    def seed(self, seed: int) -> int:
        """Of its order, in a run of that seed."""
        return seed if self.number is None else hashed(f"stretto corpus {seed} {self.number}")

    @classmethod
    def read(cls, said: Any) -> Stream:
        """What `vars` gave. Raises ValueError, KeyError or TypeError."""
        number, had = said["number"], said["had"]
        for each in (had, 0 if number is None else number):
            if type(each) is not int or not 0 <= each < 2**60:
                raise ValueError(f"{each!r} is no number of samples")
        return cls(str(said["path"]), str(said["digest"]), number, had)


@dataclass(frozen=True)
class Stretch:
    """A part of a run with one mix: after how many samples it begins, the streams of its corpora, and earlier ones."""

    begun: int
    streams: tuple[Stream, ...]
    left: tuple[Stream, ...] = ()
    """Of corpora that are in the mix no more, and may come back."""

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        each = {"streams": self.streams, "left": self.left}
        return {"begun": self.begun} | {name: [vars(stream) for stream in held] for name, held in each.items()}

    @classmethod
    def from_json(cls, said: Any) -> Stretch:
        """What `as_json` gave. Raises DataError for anything else."""
        try:
            begun, streams, left = said["begun"], said["streams"], said["left"]
            if type(begun) is not int or not 0 <= begun < 2**60 or max(len(streams), len(left)) > _MOST:
                raise ValueError(f"{begun!r} is no number of samples")
            return cls(begun, tuple(map(Stream.read, streams)), tuple(map(Stream.read, left)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the checkpoint does not say where each corpus stands: {error!r}") from error


def fresh(paths: Sequence[str], digests: Sequence[str], *, turns: bool) -> Stretch:
    """A run that begins; the corpora take turns, or are read as one."""
    each = enumerate(zip(paths, digests, strict=True))
    return Stretch(0, tuple(Stream(path, digest, n if turns else None) for n, (path, digest) in each))


def gone_on(before: Stretch, taken: Taken, consumed: int, mix: Stretch) -> Stretch:
    """The stretch that begins after `consumed` samples, when `before`'s corpora have had `taken`; `mix` is the new one.

    Corpora are known by their digests. Raises DataError where one has other text under the same path.
    """
    known = [replace(stream, had=had) for stream, had in zip(before.streams, taken, strict=True)] + [*before.left]
    streams: list[Stream | None] = []
    for wanted in mix.streams:
        same = [stream for stream in known if stream.digest == wanted.digest]
        found = next((stream for stream in same if stream.path == wanted.path), same[0] if same else None)
        if found is not None:
            known.remove(found)
            found = replace(found, path=wanted.path)
        streams.append(found)
    paths = {stream.path: stream.digest for stream in known}
    if other := [w for w, found in zip(mix.streams, streams, strict=True) if found is None and w.path in paths]:
        raise DataError(
            "; ".join(f"{w.path or 'the text'}: digest was {paths[w.path]!r}, is {w.digest!r}" for w in other)
            + ": a corpus that goes on must be the same text, with the same tokenizer and held_out; name another path "
            "for another text"
        )
    numbers = [stream.number for stream in (*known, *filter(None, streams)) if stream.number is not None]
    free = max(numbers, default=-1) + 1
    new = iter(range(free, free + len(streams)))
    found_or_new = (
        replace(wanted, number=next(new)) if found is None else found
        for wanted, found in zip(mix.streams, streams, strict=True)
    )
    return Stretch(consumed, tuple(found_or_new), tuple(known))


def hashed(text: str) -> int:
    """A number of 56 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
