"""Where in a schedule an error is: a few cells of its grid, the failing ones marked."""

from __future__ import annotations

import re
from collections.abc import Collection

from stretto.schedule.actions import Action
from stretto.schedule.ir import Schedule, ScheduleError
from stretto.schedule.simulate import DeadlockError

_ACTION = re.compile(r"\b\d+(?:UNSHARD|RESHARD|REDUCE|(?:SEND_|RECV_)?[FB]|[IW])\d+\b")


def failing(error: ScheduleError) -> list[Action]:
    """The actions that an error names first: those at which ranks stand, or of each violation the one it is about."""
    if isinstance(error, DeadlockError):
        return list(error.blocked)
    named = (_ACTION.search(line) for line in str(error).splitlines())
    return [Action.parse(match[0]) for match in named if match]


def grid(s: Schedule, marked: Collection[Action], *, around: int = 6) -> str:
    """The lists of the ranks that have marked actions, as far as `around` cells from one, each of which is in [ ].

    An action that is not there is marked at the end of the list of its rank, with a question mark.
    """
    names = [f"rank {rank}" for rank in range(s.num_ranks)]
    lines = []
    for rank, order in enumerate(s.ranks):
        cells = [f"[{a}]" if a in marked else f" {a} " for a in order]
        at = [k for k, a in enumerate(order) if a in marked]
        if missing := [a for a in marked if a.stage < s.num_stages and s.placement[a.stage] == rank and a not in order]:
            at.append(len(cells))
            cells += [f"[{a}?]" for a in sorted(missing)]
        near = {k for place in at for k in range(place - around, place + around + 1)}
        shown = ["..." if k not in near else cell for k, cell in enumerate(cells)]
        kept = [cell for k, cell in enumerate(shown) if cell != "..." or k == 0 or shown[k - 1] != "..."]
        if at:
            lines.append(f"{names[rank].ljust(len(names[-1]))}  {' '.join(kept)}".rstrip())
    return "\n".join(lines)
