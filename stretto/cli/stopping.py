"""Who says why a run stops, and whether it is to be started again."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from rich.console import Console

from stretto.initialize.group import largest
from stretto.initialize.stop import StopFlag
from stretto.world import World


@dataclass
class Told:
    """A flag that says once why it is up, to whoever watches."""

    flag: StopFlag
    console: Console | None
    said: bool = False

    def __call__(self) -> bool:
        up = self.flag()
        if up and not self.said:
            text = f"{self.flag.reason}: stopping after this step, then saving"
            logging.getLogger(__name__).info(text)
            if self.console is not None:
                self.console.print(text)
        self.said |= up
        return up


def asks_again(stop: StopFlag, world: World) -> bool:
    """Whether a run that was stopped is to be started again, on all ranks: unless some rank was ordered to leave."""
    ordered = largest(world, int(stop.ordered))
    asked = largest(world, stop.exit_code)
    return bool(asked and not ordered)
