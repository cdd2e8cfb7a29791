"""What `run.profile` says: `steps=10:13`, or `steps=10:13,ranks=0:8`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class ProfileWindow:
    """Steps and ranks to profile. As in Python's slices the end is not in it: 10:13 are steps 10, 11 and 12."""

    steps: range
    ranks: range

    @classmethod
    def read(cls, text: str) -> Self:
        """Raises ValueError, with an example, for any other text."""
        said = re.fullmatch(r"steps=(\d+)(?::(\d+))?(?:,ranks=(\d+)(?::(\d+))?)?", text.replace(" ", ""))
        if said is None:
            raise ValueError(f"profile = {text!r}: say steps=10:13, or steps=10:13,ranks=0:8")
        first, end, rank, ranks_end = (None if number is None else int(number) for number in said.groups())
        assert first is not None
        window = cls(
            range(first, first + 1 if end is None else end),
            range(1) if rank is None else range(rank, rank + 1 if ranks_end is None else ranks_end),
        )
        if first < 1 or not window.steps or not window.ranks:
            raise ValueError(
                f"profile = {text!r} holds no step or no rank: steps count from 1, and the end is not in it"
            )
        return window
