"""Who says why a run stops, whether it is to be started again, and what there is to go on from."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from rich.console import Console

from stretto.arguments import Arguments
from stretto.checkpoint import latest_complete
from stretto.initialize.group import largest
from stretto.initialize.stop import StopFlag
from stretto.train.directory import Paths
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


def after_damage(args: Arguments) -> str:
    """What there is to go on from, when weights or moments are not what they should be."""
    found = latest_complete(Paths.of(args).checkpoints).path
    if found is None:
        return "\n  no checkpoint was saved before it: begin anew, and save on the way with --save-every"
    return f"\n  {found} is from before it was noticed: go on from there with --resume"


def after_divergence(args: Arguments, step: int) -> str:
    """What there is to go on from."""
    if args.checkpoint.init_from is not None and step == 1:  # no learning rate has done that
        begun = f"weights of {args.checkpoint.init_from} are not finite, or too large for {args.run.dtype}"
        return f"\n  no update was made before it: {begun}"
    found = latest_complete(Paths.of(args).checkpoints).path
    if found is None:
        ways = "begin anew with a lower --lr or --clip-grad, and save on the way with --save-every"
        return f"\n  no checkpoint was saved before it: {ways}"
    return (
        f"\n  {found} is from before it: go on from there with --resume and a lower --lr or --clip-grad; should it "
        "diverge again, remove that checkpoint and --resume takes the one before"
    )
