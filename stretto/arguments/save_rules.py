"""What goes together in the saves of a run."""

from __future__ import annotations

from stretto.arguments.rule import RuleViolation, rule
from stretto.arguments.schema import Arguments


@rule("checkpoint.save", "checkpoint.save_every", "run.sample_tokens", "run.exit_duration")
def checkpoints_are_there(a: Arguments) -> RuleViolation | None:
    """What needs checkpoints is not asked of a run that writes none."""
    if a.checkpoint.save:
        return None
    said = {
        "checkpoint.save_every": (a.checkpoint.save_every, 0),
        "run.sample_tokens": (a.run.sample_tokens, 0),
        "run.exit_duration": (a.run.exit_duration, None),
    }
    asked = {path: (value, none) for path, (value, none) in said.items() if value}
    if not asked:
        return None
    what = ", ".join(f"{path.partition('.')[2]} = {value}" for path, (value, _) in asked.items())
    fixes = {path: (none,) for path, (_, none) in asked.items()} if len(asked) == 1 else {}
    return RuleViolation(f"no checkpoint is saved, but {what}", {"checkpoint.save": (True,), **fixes})
