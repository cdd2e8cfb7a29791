"""`--resume` and `--auto-resume`: the newest complete checkpoint of a run, and the configuration that it remembers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from stretto.arguments import ConfigError, Record, Resolved, Violation
from stretto.checkpoint import CheckpointError, latest_complete
from stretto.checkpoint.marker import read_extra
from stretto.initialize.environment import Launch
from stretto.train.directory import Paths


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from."""

    path: Path
    step: int
    record: Record

    def require_steps_ahead(self, resolved: Resolved) -> None:
        """Raise ConfigError when the run would be over before it began."""
        steps = resolved.args.run.steps
        if steps < self.step:
            problem = f"run.steps={steps}, but {self.path} is of step {self.step}"
            fix = {"run.steps": self.step + steps}
            raise ConfigError([Violation("steps_ahead", ("run.steps",), problem, fixes=(fix,))])


def newest(out: str, launch: Launch, *, required: bool) -> list[Resumed]:
    """The newest complete checkpoint in the directory of a run, if any; rank 0 says which ones it passes over.

    Raises ConfigError when there is none though `required`, or when it is not a run's.
    """
    try:
        return _newest(Paths(Path(out).expanduser()).checkpoints, launch, required)
    except CheckpointError as error:
        raise ConfigError([Violation("resume", ("checkpoint.resume",), str(error))]) from error


def _newest(directory: Path, launch: Launch, required: bool) -> list[Resumed]:
    found = latest_complete(directory)
    if launch.rank == 0:
        for skipped in found.skipped:
            print(f"stretto train: passing over {skipped.path}: {skipped.reason}", file=sys.stderr)
    if found.path is None and not required:
        return []
    if found.path is None:
        raise CheckpointError(f"--resume: no complete checkpoint in {directory}; leave --resume out to begin anew")
    extra = read_extra(found.path)
    if "record" not in extra:
        raise CheckpointError(f"{found.path} was not written by `stretto train`: it has no record of a run to go on")
    return [Resumed(found.path, int(extra["step"]), Record.from_dict(extra["record"], str(found.path)))]
