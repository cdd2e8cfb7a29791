"""How long the start of a run took, told when it is over."""

from __future__ import annotations

import logging
from collections.abc import Callable

from stretto.initialize.timeline import StartTimeline, line
from stretto.train.record import Listener, StepRecord
from stretto.world import World


class StartUp(Listener):
    """Says once, when the first step is done, how long each phase of the start took; listens on every rank.

    Each rank logs its own phases; rank 0 hears those of all and gives the line to `say`, others tell rank 0 alone.
    """

    everywhere = True

    def __init__(self, timeline: StartTimeline, world: World, say: Callable[[str], None]) -> None:
        self._timeline, self._world, self._say = timeline, world, say
        self._told = False

    def stepped(self, record: StepRecord) -> None:
        if self._told:
            return
        self._told = True
        timeline = self._timeline
        numbers = {"seconds": {**timeline.seconds, "total": timeline.total}, "step": record.step}
        logging.getLogger(__name__).info("start-up: %s", timeline, extra=numbers)
        phases = timeline.gather(self._world)
        if phases is not None:
            self._say(line(phases, timeline.total))
