"""What every rank of a pipeline does, in order: plain data, made and checked before a device is touched.

    s = one_f_one_b(4, 8)                 # order alone: a Schedule
    check(s)                              # complete, each action on its rank, no deadlock
    program = lower(s, ZERO1)             # with messages and UNSHARD, REDUCE: what an executor runs
    print(draw(s))                        # the order as text
    print(gantt(simulate(s)))             # against time

`actions` and `ir` have the language, `requires` the one rule of what must come before what; a new schedule is one more
function in `generators`.
"""

from stretto.schedule.actions import Action, Op
from stretto.schedule.check import check
from stretto.schedule.check_lowered import check_lowered
from stretto.schedule.costs import Cost
from stretto.schedule.draw import draw, gantt
from stretto.schedule.generators import GENERATORS, gpipe, one_f_one_b, schedule_for
from stretto.schedule.ir import Order, Schedule, ScheduleError
from stretto.schedule.lower import lower
from stretto.schedule.partition import partition
from stretto.schedule.requires import requires
from stretto.schedule.sharding import DDP, FSDP, ZERO1, ZERO2, Sharding
from stretto.schedule.simulate import DeadlockError, Span, Timeline, bubble, makespan, peak_live, simulate, step_time

__all__ = [
    "DDP",
    "FSDP",
    "GENERATORS",
    "ZERO1",
    "ZERO2",
    "Action",
    "Cost",
    "DeadlockError",
    "Op",
    "Order",
    "Schedule",
    "ScheduleError",
    "Sharding",
    "Span",
    "Timeline",
    "bubble",
    "check",
    "check_lowered",
    "draw",
    "gantt",
    "gpipe",
    "lower",
    "makespan",
    "one_f_one_b",
    "partition",
    "peak_live",
    "requires",
    "schedule_for",
    "simulate",
    "step_time",
]
