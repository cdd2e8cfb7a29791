"""`--resume` and `--auto-resume`: the newest complete checkpoint of a run, and the configuration that it remembers."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stretto.arguments import ConfigError, Record, Resolved, Violation, from_dict
from stretto.checkpoint import CheckpointError, latest_complete
from stretto.checkpoint.marker import read_extra
from stretto.checkpoint.places import place
from stretto.cli.resume_changes import changes, forbidden, told
from stretto.cli.usage_error import reject
from stretto.initialize.environment import Launch
from stretto.initialize.rendezvous import Meeting, RankZeroError, RendezvousError, from_rank_0, rendezvous
from stretto.reading import shown
from stretto.store import read_json
from stretto.terminal import say
from stretto.train.checkpointing import step_of
from stretto.train.learning_rate import changed_rate

MEETING_SECONDS: Final = 120.0
"""How long ranks wait for each other, and then for rank 0 to find a checkpoint among the files of a run."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from."""

    path: Path
    step: int
    record: Record
    tokenizer: str = ""
    """The fingerprint of the tokenizer whose tokens were read, where the checkpoint says it."""

    def require_fits(self, resolved: Resolved) -> None:
        """Raise ConfigError when the run would be over before it began, or is to be of another model."""
        self.require_steps_ahead(resolved)
        self.require_same_model(resolved)

    def require_steps_ahead(self, resolved: Resolved) -> None:
        """Raise ConfigError when the run would be over before it began."""
        steps = resolved.args.run.steps
        if steps < self.step:
            problem = f"run.steps={steps}, but {self.path} is of step {self.step}"
            fix = {"run.steps": self.step + steps}
            raise ConfigError([Violation("steps_ahead", ("run.steps",), problem, fixes=(fix,))])

    def require_same_tokenizer(self, name: str, fingerprint: str) -> None:
        """Raise ConfigError where the tokenizer `name` is another one: every token would mean something else."""
        if not self.tokenizer or self.tokenizer == fingerprint:
            return
        before = str(self.record.arguments.get("data", {}).get("tokenizer") or "another")
        same = f"of the same name, {before!r}, whose file has changed" if before == name else repr(before)
        problem = (
            f"{self.path} was trained with the tokenizer {same} (fingerprint {shown(self.tokenizer)}), but "
            f"data.tokenizer is {name!r} ({fingerprint!r}): every token would mean something else"
        )
        way = (
            "put the file back"
            if before == name
            else f"leave --tokenizer out, or say --tokenizer {shlex.quote(before)},"
        )
        hint = f"{way} to go on; leave --resume out, with another --out, to begin anew"
        raise ConfigError([Violation("resume", ("data.tokenizer",), problem, hint=hint)])

    def as_json(self) -> str:
        """For the ranks that did not look."""
        where = {"path": str(self.path), "step": self.step, "tokenizer": self.tokenizer}
        return json.dumps({**where, "record": self.record.as_dict()})

    @classmethod
    def from_json(cls, said: str) -> Resumed:
        """What `as_json` gave. Raises ConfigError for anything else."""
        try:
            each = read_json(said.encode())
            path, step = place(str(each["path"])), int(each["step"])
        except (ValueError, TypeError, KeyError, CheckpointError) as error:
            raise ConfigError(
                [Violation("resume", ("checkpoint.resume",), f"rank 0 named no checkpoint: {error}")]
            ) from error
        return cls(path, step, Record.from_dict(each.get("record"), str(path)), str(each.get("tokenizer") or ""))

    def require_same_model(self, resolved: Resolved) -> None:
        """Raise ConfigError, with both values, where the run is to be of another model or in another order."""
        if wrong := forbidden(changes(self.record, resolved), str(self.path)):
            raise ConfigError(wrong)

    def all_changes(self, resolved: Resolved) -> tuple[tuple[str, str | None], ...]:
        """What the user has changed, in one line, and what it makes of the learning rate; None where nothing."""
        changed = told(changes(self.record, resolved))
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


def newest(directory: str, *, required: bool) -> list[Resumed]:
    """The newest complete checkpoint in a directory, if any; says which ones it passes over.

    Raises ConfigError when there is none though `required`, or when it is not a run's.
    """
    try:
        return _newest(place(directory), required)
    except CheckpointError as error:
        raise ConfigError([Violation("resume", ("checkpoint.resume",), str(error))]) from error


@dataclass(frozen=True)
class Look:
    """What there is to go on from, and where the ranks have met to hear of it, if they had to."""

    found: Resumed | None
    met: Meeting | None
    meeting: ExitStack
    """What ends the meeting."""

    def require_fits(self, resolved: Resolved) -> None:
        """Raise ConfigError when the run would be over before it began, or is to be of another model."""
        if self.found is not None:
            self.found.require_fits(resolved)

    def require_same_tokenizer(self, name: str, fingerprint: str) -> None:
        """As that of what is gone on with."""
        if self.found is not None:
            self.found.require_same_tokenizer(name, fingerprint)


def look(directory: str, launch: Launch, meeting: ExitStack, *, required: bool) -> Look:
    """The newest complete checkpoint in the directory of a run, on all ranks: rank 0 looks, and tells the others.

    They meet for it, and leave as `meeting` ends. Raises ConfigError as `newest` does, and SystemExit when they do not
    find each other.
    """
    if launch.size == 1:
        return Look(next(iter(newest(directory, required=required)), None), None, meeting)
    try:
        met = meeting.enter_context(rendezvous(launch, timeout=MEETING_SECONDS))
        found = _newest_of_rank_0(met, launch, directory, required)
    except RendezvousError as error:
        raise SystemExit(reject(error, launch, code=1, every=isinstance(error, RankZeroError))) from None
    return Look(next(iter(found), None), met, meeting)


def _newest_of_rank_0(met: Meeting, launch: Launch, directory: str, required: bool) -> list[Resumed]:
    problem: list[ConfigError] = []

    def see() -> str:
        try:
            found = newest(directory, required=required)
        except ConfigError as error:
            problem.append(error)
            return ""
        return found[0].as_json() if found else "none"

    said = from_rank_0(met, launch, "the checkpoint to go on from", see, timeout=MEETING_SECONDS)
    if problem:
        raise problem[0]
    if not said:
        raise ConfigError([Violation("resume", ("checkpoint.resume",), "rank 0 cannot go on from a checkpoint")])
    return [] if said == "none" else [Resumed.from_json(said)]


def _newest(directory: Path, required: bool) -> list[Resumed]:
    found = latest_complete(directory)
    for skipped in found.skipped:
        say(f"stretto train: passing over {skipped}")
    if found.path is None and not required:
        return []
    if found.path is None:
        raise CheckpointError(f"--resume: no complete checkpoint in {directory}; leave --resume out to begin anew")
    extra = read_extra(found.path)
    feed = extra.get("feed")
    tokenizer = feed.get("tokenizer") if isinstance(feed, dict) else None
    record = Record.from_dict(extra.get("record"), str(found.path))
    return [Resumed(found.path, step_of(extra, found.path), record, tokenizer if isinstance(tokenizer, str) else "")]
