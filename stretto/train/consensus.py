"""What all ranks must agree on before the first step, so that a run is rejected by all of them or by none."""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Callable, Iterable
from typing import TypeVar

from stretto.arguments import ConfigError
from stretto.checkpoint import CheckpointError
from stretto.checkpoint.peers import Peers
from stretto.data.errors import DataError
from stretto.data.text import Text
from stretto.interop.errors import InteropError
from stretto.layout.ranks import by_value, named
from stretto.parallel_state import ParallelState

T = TypeVar("T")


class RunRejectedError(RuntimeError):
    """The run cannot start as it was asked for; the message is the same on every rank."""


USAGE_ERRORS = (ConfigError, DataError, CheckpointError, InteropError, RunRejectedError)
"""What the user can mend: told in a message, without a traceback."""


def on_all_ranks(state: ParallelState, prepare: Callable[[], T]) -> T:
    """The result of `prepare`, which makes no collective; when it fails on some rank, RunRejectedError on all."""
    result: T | None = None
    problem = None
    try:
        result = prepare()
    except (*USAGE_ERRORS, OSError) as error:
        problem = str(error) or type(error).__name__
    require_no_problem(enumerate(_gathered(state, problem or "")), state.layout.world)
    return result  # type: ignore[return-value]  # prepare has returned it


def require_same_text(state: ParallelState, text: Text) -> None:
    """Raise RunRejectedError on all ranks unless all read the same tokens.

    They need not: node-local copies of a corpus may differ, and the default corpus is that of each node's Python.
    """
    stores = [("train on", store) for store in text.mix.stores] + [(each.name, each.store) for each in text.eval_sets]
    value = json.dumps([[name, store.header.digest, f"{store.header.tokens:,}"] for name, store in stores])
    ranks = by_value(enumerate(_gathered(state, value)))
    if len(ranks) == 1:
        return
    here = f"on {socket.gethostname()}, Python {platform.python_version()}, from {text.mix.stores[0].path.parent}"
    where = Peers.of(state.world, state.axis("tp", "cp", "dp", "pp").group).gather(here)
    lines = [
        f"  {named(who)} {where[who[0]]}: " + ", ".join(f"{n} tokens, {name} ({d[:8]})" for name, d, n in said)
        for said, who in ((json.loads(value), who) for value, who in ranks.items())
    ]
    raise RunRejectedError(
        "ranks read different text, so they would not train one model:\n" + "\n".join(lines) + "\n  name the same "
        "files on every node with --data; without it, each node's own Python standard library is the text"
    )


def require_no_problem(problems: Iterable[tuple[int, str]], size: int) -> None:
    """Raise RunRejectedError with each problem once, and the ranks that have it where rank 0 is none of them."""
    ranks = by_value((rank, problem) for rank, problem in problems if problem)
    if ranks:
        said = (text if 0 in who else f"{text} ({named(who)} of {size})" for text, who in ranks.items())
        raise RunRejectedError("\n".join(said))


def _gathered(state: ParallelState, mine: str) -> list[str]:
    """Each rank's value."""
    return [each or "" for each in Peers.of(state.world, state.axis("tp", "cp", "dp", "pp").group).gather(mine)]
