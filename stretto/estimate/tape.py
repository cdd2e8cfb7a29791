"""What lives while a computation goes on, as its code makes tensors and lets go of them: the most at once is a peak.

A peak is not a sum of what each part needs at most: one part lets go before another makes. So the tensors of a forward
or a backward are written down in order, by name and size, and the largest sum of a moment is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

_HELD: Final = "by a local name"


class Moment(NamedTuple):
    """Of a computation the moment in which most lives, and how many bytes those are."""

    name: str
    bytes: int


class Stretch(NamedTuple):
    """Of a computation what lies between two places where it may be left."""

    most: Moment
    left: int
    """Bytes that live where it is left."""

    def without(self, bytes: int) -> Stretch:
        """The same, where so much of what lives is counted elsewhere."""
        return Stretch(Moment(self.most.name, self.most.bytes - bytes), self.left - bytes)


class Tape:
    """Tensors by name, with their bytes. What is `held_back` lives on until the next collective hides its use."""

    def __init__(self, **live: int) -> None:
        self._live = dict(live)
        self._held_back: list[str] = []
        self._name = ""
        self.most = self._since = Moment("", sum(live.values()))
        self._stretches: list[Stretch] = []

    @property
    def now(self) -> int:
        """Bytes that live."""
        return sum(self._live.values())

    @property
    def live(self) -> dict[str, int]:
        """What lives, by name."""
        return dict(self._live)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """What is made within is of this moment."""
        before, self._name = self._name, name
        yield
        self._name = before

    def make(self, **sizes: int) -> None:
        """These are made, and live beside all that does."""
        self._live |= sizes
        if (now := self.now) > self._since.bytes:
            self._since = Moment(self._name, now)
            if now > self.most.bytes:
                self.most = self._since

    def leave(self) -> None:
        """Here a computation may be left for another one."""
        self._stretches.append(Stretch(self._since, self.now))
        self._since = Moment(self._name, self.now)

    @property
    def stretches(self) -> list[Stretch]:
        """Between the places where it may be left."""
        return [*self._stretches, Stretch(self._since, self.now)]

    def free(self, *names: str) -> None:
        """Nobody holds these any more; none of them need have been there."""
        for name in names:
            self._live.pop(name, None)

    def hold(self, *names: str) -> None:
        """Nothing needs these any more, but local names still hold them: until `release`."""
        self.rename(**{name: f"{name} {_HELD}" for name in names})

    def release(self, *names: str) -> None:
        """The local names are gone."""
        self.free(*(f"{name} {_HELD}" for name in names))

    def rename(self, **names: str) -> None:
        """These are made anew while they live under another name."""
        self._live = {names.get(name, name): size for name, size in self._live.items()}

    def pass_through(self, **sizes: int) -> None:
        """Made, and gone when the next is made."""
        self.make(**sizes)
        self.free(*sizes)

    def hold_back(self, *names: str) -> None:
        """A weight gradient needs these, and is computed behind the next collective: until then they live."""
        self._held_back += names

    def flush(self) -> None:
        """A collective is in flight: what was held back is used now."""
        self.free(*self._held_back)
        self._held_back = []
