"""The text of a run that a launcher has started: few ranks look at it, and tell the others what they found.

Rank 0 walks the corpora and has them tokenized. Every other rank opens the stores that rank 0 names. Where a host has a
file system of its own, so that they are not there or hold other tokens, the first of its ranks looks, for that host.
Of 16,384 ranks that share a file system one walks the corpora.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Thread
from typing import Final

from stretto.arguments import Arguments
from stretto.checkpoint.peers import Peers
from stretto.data.errors import DataError
from stretto.data.lock import Tell
from stretto.data.text import Text
from stretto.initialize.group import largest
from stretto.train.consensus import USAGE_ERRORS, require_no_problem
from stretto.world import World

_LONGEST_PAUSE: Final = 2.0
"""Seconds between two questions whether those who look are done."""


def shared_text(args: Arguments, world: World, tell: Tell | None = None) -> Text:
    """The text of this rank; `tell` hears how far the tokenizing is. All ranks call it, and wait as long as it takes.

    Raises RunRejectedError on all ranks when some rank that looked cannot use it.
    """
    peers, here, text = Peers.of(world, None), socket.gethostname(), None
    looking = [0]
    while looking:
        look = _Look(lambda: Text.open(args, tell)) if peers.rank in looking else None
        pause = 0.01
        while largest(world, int(look is not None and look.is_alive())):
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        said = peers.gather(look.said(here) if look else None)
        found = {rank: json.loads(each) for rank, each in enumerate(said) if each is not None}
        require_no_problem(((rank, str(each.get("problem", ""))) for rank, each in found.items()), world.size)
        text = text or (look.text if look else next(_known(args, found, here), None))
        without = peers.gather(here if text is None else None)
        looking = list({host: rank for rank, host in reversed([*enumerate(without)]) if host is not None}.values())
    assert text is not None
    return text


class _Look(Thread):
    """A look at the text beside the main thread, which tells the others meanwhile that it goes on."""

    def __init__(self, look: Callable[[], Text]) -> None:
        super().__init__(name="stretto-text", daemon=True)
        self.text: Text | None = None
        self._look, self._failure = look, RuntimeError("not looked yet")
        self.start()

    def run(self) -> None:
        try:
            self.text = self._look()
        except BaseException as error:  # noqa: BLE001  # it is raised by `said`
            self._failure = error  # type: ignore[assignment]

    def said(self, host: str) -> str:
        """What it found, for the other ranks. Raises what is no fault of the user's."""
        if self.text is not None:
            return json.dumps({"host": host, "known": self.text.known})
        if not isinstance(self._failure, (*USAGE_ERRORS, OSError)):
            raise self._failure
        return json.dumps({"host": host, "problem": str(self._failure) or type(self._failure).__name__})


def _known(args: Arguments, found: dict[int, dict[str, object]], here: str) -> Iterator[Text]:
    """The text that others found, those of this host first, as far as its stores are here."""
    for each in sorted(found.values(), key=lambda each: each["host"] != here):
        with suppress(DataError):
            yield Text.open(args, known=each["known"])  # type: ignore[arg-type]  # read with suspicion
