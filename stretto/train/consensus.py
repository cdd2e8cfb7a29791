"""What all ranks must agree on before the first step, so that a run is rejected by all of them or by none."""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from stretto.arguments import Arguments, ConfigError
from stretto.arguments.errors import as_text
from stretto.arguments.tree import get, settings
from stretto.checkpoint import CheckpointError
from stretto.checkpoint.peers import Peers
from stretto.data.errors import DataError
from stretto.data.text import Text
from stretto.interop.errors import InteropError
from stretto.layout.ranks import by_value, named
from stretto.parallel_state import ParallelState
from stretto.world import World

T = TypeVar("T")


class RunRejectedError(RuntimeError):
    """The run cannot start as it was asked for; the message is the same on every rank."""


_OWN: Final = frozenset({
    "run.progress", "run.log_level", "run.log_style", "run.threads", "run.tensorboard", "run.wandb", "run.mlflow",
    "run.peak_tflops",
})  # fmt: skip
"""Settings that say what one rank tells, or of the machine that it is on."""

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


def require_same_settings(args: Arguments, world: World) -> None:
    """Raise RunRejectedError on all ranks unless all were started to do the same, but for what is each rank's own.

    A script may start each with other words: two learning rates are two models, and no collective notices.
    """
    mine = {path: as_text(get(args, path)) for path, s in settings().items() if not s.is_path and path not in _OWN}
    said = [json.loads(each or "{}") for each in Peers.of(world, None).gather(json.dumps(mine))]
    wrong = []
    for path in mine:
        ranks = by_value((rank, str(each.get(path))) for rank, each in enumerate(said))
        if len(ranks) > 1:
            wrong.append(f"  {path}: " + ", ".join(f"{value} on {named(who)}" for value, who in ranks.items()))
    if wrong:
        raise RunRejectedError(
            "ranks were started with different settings, so they would not train one model:\n"
            + "\n".join(wrong)
            + "\n  start all of them with the same words"
        )


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
