"""The table of PyTorch's pipelining as text: a line for each rank, a cell for each action, empty where it idles.

    0F0,0F1,,,0B0,,0B1
    ,1F0,1F1,1B0,,1B1,

`torch.distributed.pipelining` writes and reads such files (`_load_csv`, `_dump_csv`).
"""

from __future__ import annotations

import re

from stretto.schedule.actions import COMPUTE, Action
from stretto.schedule.ir import Schedule, ScheduleError

_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")
_PASSED_OVER = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD|(SEND|RECV)_[FB]\d+)")


def to_csv(s: Schedule) -> str:
    """The computation of the schedule; what `lower` adds is left to who reads it."""
    return "".join(",".join(str(a) for a in order if a.op in COMPUTE) + "\n" for order in s.ranks)


def from_csv(text: str) -> Schedule:
    """The schedule of such a table: empty cells, messages and the verbs of the weights are passed over.

    A forward and a backward that overlap come one after the other. Raises ScheduleError naming a cell that is none.
    """
    ranks: list[list[Action]] = []
    for rank, line in enumerate(text.strip("\n").split("\n")):
        actions: list[Action] = []
        for column, cell in enumerate(line.split(",")):
            pair = _OVERLAP.fullmatch(cell.strip())
            for word in pair[1].split(";") if pair else [cell]:
                word = word.strip()
                if not word or _PASSED_OVER.fullmatch(word):
                    continue
                try:
                    actions.append(Action.parse(word))
                except ValueError as error:
                    raise ScheduleError(f"rank {rank}, column {column}: {error}") from None
        ranks.append(actions)
    return Schedule.of_ranks(ranks)
