"""What ranks must agree on before the first step, or none of them makes it.

Faults to catch: two learning rates, which no collective notices; a rank's own directory taken for a difference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from stretto.arguments import parse
from stretto.testing import Pool
from stretto.train.consensus import RunRejectedError, require_same_settings
from stretto.world import World

pytestmark = pytest.mark.gloo


def compared(world: World) -> str:
    """What rank 1 is told, whose learning rate, length and directories are others."""
    args = parse(["--preset", "tiny", "--nproc", "3", "--global-batch", "9"], files=False).args
    if world.rank == 1:
        args = replace(args, optimizer=replace(args.optimizer, lr=2e-3), run=replace(args.run, steps=3, threads=7))
        args = replace(args, checkpoint=replace(args.checkpoint, out="elsewhere"))
    try:
        require_same_settings(args, world)
    except RunRejectedError as error:
        return str(error)
    return ""


def test_ranks_with_other_settings_are_told(pool: Pool) -> None:
    for said in pool.run(3, compared):
        assert "\n  optimizer.lr: 0.001 on ranks 0, 2, 0.002 on rank 1\n" in said
        assert "\n  run.steps: 4 on ranks 0, 2, 3 on rank 1\n" in said
        assert said.count("\n") == 3 + ("decay_steps" in said)
