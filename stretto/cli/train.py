"""`stretto train`: train a model, with workers of its own or those that a launcher has started."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from stretto.arguments import ConfigError, Record
from stretto.cli.megatron import layer
from stretto.cli.usage_error import reject
from stretto.cli.words import parse_for_here
from stretto.initialize.clock import process_began
from stretto.initialize.environment import Launch, LaunchError, detect
from stretto.initialize.stop import StopFlag, Stopped
from stretto.terminal import say

if TYPE_CHECKING:
    from stretto.cli.resume import Look


def main(argv: Sequence[str]) -> int:
    """Run `stretto train ...`; 0, 2 when what it was given cannot be used, or 1 when the run failed."""
    # A process that is no `stretto` command, such as a notebook, began long before the run.
    began = process_began() if sys.argv[1:2] in (["train"], ["launch"]) else time.monotonic()
    try:
        launch = detect(os.environ)
    except LaunchError as error:
        say(f"stretto train: {error}")
        return 2
    # Its clock starts here: a job's time runs while torch is loaded and the text is read, too.
    with StopFlag(starting=True) as stop:
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            # A launcher may hold a warning back until there is somebody to take it, and from when nobody is any more.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1,))
            return _train(argv, launch, stop, began)
        except Stopped as stopped:
            return stopped.say(launch.rank)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held_back)


def _train(argv: Sequence[str], launch: Launch, stop: StopFlag, began: float) -> int:
    with ExitStack() as meeting:  # of ranks that a launcher has started, where they meet to hear of a checkpoint
        return _train_within(argv, launch, stop, began, meeting)


def _train_within(argv: Sequence[str], launch: Launch, stop: StopFlag, began: float, meeting: ExitStack) -> int:
    world = None if launch.source == "python" else launch.size
    looks: list[Look] = []

    def resumed(directory: str, required: bool) -> Record | None:
        from stretto.cli.resume import look  # loads torch

        looks.append(look(directory, launch, meeting, required=required))
        found = looks[0].found
        return found.record if found else None

    translate = partial(layer, tell=launch.rank == 0, processes=world)
    try:
        resolved = parse_for_here(argv, world_size=world, checkpoint=resumed, translate=translate)
        for each in looks:
            each.require_fits(resolved)
    except ConfigError as error:
        return reject(error, launch)
    from stretto.cli.training import run  # only now: what is wrong with the arguments is said before torch loads

    return run(resolved, launch, looks[0] if looks else None, stop, began)
