"""One rank of `stretto train` that stops or kills itself at a moment: see `drills.py`.

DRILL='{"victim": 2, "signal": 9, "moment": "groups", "nth": 1, "delay": 0.1}' python drill_rank.py train ...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from stretto.cli import main
from stretto.cli.training import Task
from stretto.initialize import process, rendezvous
from stretto.initialize.failure_watch import Ours
from stretto.initialize.timeline import StartTimeline
from stretto.parallel_state import ParallelState, state
from stretto.train.loop import Loop
from stretto.train.saves import Saves

PHASES = ("rendezvous", "groups", "data", "model", "checkpoint", "output", "evaluation", "first step")
"""Of the start, as a `StartTimeline` has them."""

PLACES: dict[str, tuple[Any, str]] = {
    "default group": (process, "default_group"),
    "agreement": (state, "check_same_plan"),
    "group creation": (state, "create_group"),
    "save": (Saves, "begin"),
    "evaluate": (Loop, "evaluate"),
    "step": (Loop, "_step"),
    "report": (Loop, "_report"),
    "teardown": (ParallelState, "close"),
    "end": (Ours, "end"),
    "goodbye": (rendezvous, "goodbye"),
    "conclusion": (Task, "_conclude"),
}
"""Functions at whose n-th call it happens."""


def arm(drill: dict[str, Any]) -> None:
    """Have it happen on the victim, `delay` seconds after it comes to the moment."""

    def now() -> None:
        sys.stderr.write(f"drill: {os.getpid()} {drill['moment']}\n")
        sys.stderr.flush()
        if drill["command"]:
            subprocess.run(drill["command"], check=True)
        else:
            os.kill(os.getpid(), drill["signal"])

    came = 0

    def come() -> None:
        nonlocal came
        if os.environ.get("RANK") != str(drill["victim"]):
            return
        came += 1
        if came == drill["nth"]:
            if drill["delay"] == 0:
                now()
            else:
                threading.Timer(drill["delay"], now).start()

    moment = drill["moment"]
    if moment in PHASES:
        phase = StartTimeline.phase

        def begun(self: StartTimeline, name: str) -> AbstractContextManager[None]:
            if name == moment:
                come()
            return phase(self, name)

        StartTimeline.phase = begun  # type: ignore[method-assign, assignment]
    else:
        where, name = PLACES[moment]
        before: Callable[..., Any] = getattr(where, name)

        def after(*args: Any, **more: Any) -> Any:
            come()
            return before(*args, **more)

        setattr(where, name, after)


if __name__ == "__main__":
    arm(json.loads(os.environ["DRILL"]))
    sys.exit(main(sys.argv[1:]))
