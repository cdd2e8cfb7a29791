"""The time limit of a job, in all forms that sbatch takes; pure."""

from __future__ import annotations

import re

FORMS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds"
NO_LIMIT = ("UNLIMITED", "INFINITE")

_TIME = re.compile(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?")


def limit_seconds(text: str) -> int | None:
    """Seconds of a limit, rounded up to whole minutes as sbatch does; None for no limit, as 0 is, too.

    Raises ValueError when sbatch would not take it.
    """
    if text.upper() in NO_LIMIT:
        return None
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"time={text!r} is none of sbatch's forms: {FORMS}, 0, UNLIMITED or INFINITE")
    days, *parts = (None if part is None else int(part) for part in found.groups())
    numbers = [part for part in parts if part is not None]
    if days is None and len(numbers) < 3:
        numbers = [0, *numbers]  # of one or two numbers the first are minutes
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    whole = (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return -(-whole // 60) * 60 or None
