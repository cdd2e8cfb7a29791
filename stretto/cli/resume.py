"""`--resume` and `--auto-resume`: the newest complete checkpoint of a run, and the configuration that it remembers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stretto.arguments import ConfigError, Record, Resolved, Violation, from_dict
from stretto.arguments.resuming import changes, forbidden, told
from stretto.checkpoint import CheckpointError, latest_complete
from stretto.checkpoint.marker import read_extra
from stretto.checkpoint.places import place
from stretto.initialize.environment import Launch
from stretto.terminal import say
from stretto.train.checkpointing import step_of
from stretto.train.learning_rate import changed_rate


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

    def require_same_model(self, resolved: Resolved) -> None:
        """Raise ConfigError, with both values, where the run is to be of another model or in another order."""
        if wrong := forbidden(changes(self.record, resolved.args), str(self.path)):
            raise ConfigError(wrong)

    def all_changes(self, resolved: Resolved) -> tuple[tuple[str, str | None], ...]:
        """What the user has changed, in one line, and what it makes of the learning rate; None where nothing."""
        changed = told(changes(self.record, resolved.args))
        return ("changed", changed), ("learning rate", self._rate_change(resolved))

    def _rate_change(self, resolved: Resolved) -> str | None:
        """What the next update's learning rate was to be and is now, where the schedule is another one."""
        if resolved.args.run.steps <= self.step:
            return None
        try:
            before = from_dict(self.record.arguments, name=self.record.name).optimizer
            return changed_rate(before, resolved.args.optimizer, self.step + 1)
        except (ConfigError, ValueError, ZeroDivisionError):  # a record without a schedule that can be followed
            return None


def newest(directory: str, launch: Launch, *, required: bool) -> list[Resumed]:
    """The newest complete checkpoint in a directory, if any; rank 0 says which ones it passes over.

    Raises ConfigError when there is none though `required`, or when it is not a run's.
    """
    try:
        return _newest(place(directory), launch, required)
    except CheckpointError as error:
        raise ConfigError([Violation("resume", ("checkpoint.resume",), str(error))]) from error


def _newest(directory: Path, launch: Launch, required: bool) -> list[Resumed]:
    found = latest_complete(directory)
    if launch.rank == 0:
        for skipped in found.skipped:
            say(f"stretto train: passing over {skipped.path}: {skipped.reason}")
    if found.path is None and not required:
        return []
    if found.path is None:
        raise CheckpointError(f"--resume: no complete checkpoint in {directory}; leave --resume out to begin anew")
    extra = read_extra(found.path)
    return [Resumed(found.path, step_of(extra, found.path), Record.from_dict(extra.get("record"), str(found.path)))]
