"""Programs: where the messages and the verbs of the weights stand, and that no order of arrival can deadlock."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import GENERATED, any_schedule

from stretto.schedule import (
    DDP,
    FSDP,
    ZERO1,
    ZERO2,
    Action,
    Cost,
    DeadlockError,
    Op,
    Schedule,
    ScheduleError,
    Sharding,
    check_lowered,
    gpipe,
    lower,
    one_f_one_b,
    requires,
    simulate,
)

pytestmark = pytest.mark.pure

VALID = GENERATED | any_schedule()
SHARDINGS = st.sampled_from([DDP, ZERO1, ZERO2, FSDP])
TIMES = st.floats(0, 10)
COSTS = st.builds(Cost, TIMES, TIMES, TIMES, TIMES, TIMES)
COMPUTE = (Op.F, Op.B, Op.I, Op.W)
MESSAGES = (Op.SEND_F, Op.RECV_F, Op.SEND_B, Op.RECV_B)


@given(VALID, SHARDINGS, COSTS)
def test_every_program_checks_whatever_the_costs(s: Schedule, sharding: Sharding, cost: Cost) -> None:
    """Catches messages placed by one rank's view alone: `check_lowered` plays sends that block."""
    check_lowered(lower(s, sharding, cost), sharding)


@given(VALID, SHARDINGS)
def test_the_computation_stays_as_it_was(s: Schedule, sharding: Sharding) -> None:
    program = lower(s, sharding)
    kept = tuple(tuple(a for a in order if a.op in COMPUTE) for order in program.ranks)
    assert replace(program, ranks=kept) == s


@given(VALID, st.none() | st.integers(0, 6), st.integers(0, 4), st.booleans())
def test_the_verbs_of_the_weights_stand_where_the_executor_relies_on_them(
    s: Schedule, keep: int | None, ahead: int, reduce_each: bool
) -> None:
    """Catches a RESHARD one computation late, a visit that is never opened, a REDUCE after its gradient."""
    sharding = Sharding(True, True, True, keep=keep, ahead=ahead, reduce_each=reduce_each)
    program = lower(s, sharding)
    check_lowered(program, sharding)
    for order in program.ranks:
        computes = [a for a in order if a.op in COMPUTE]
        for stage in {a.stage for a in order}:
            whole, held, visits = False, [], 0
            for at, a in enumerate(order):
                if a == Action(stage, Op.UNSHARD, visits):
                    whole = True
                elif a == Action(stage, Op.RESHARD, visits):
                    assert order[at - 1].stage == stage
                    assert order[at - 1].op in COMPUTE
                    whole, visits = False, visits + 1
                elif a.stage == stage and a.op in (Op.F, Op.B, Op.I):
                    assert whole
                    held.append((computes.index(a), visits))
            assert not whole
            for (i, before), (j, after) in pairwise(held):
                assert (after > before) == (keep is not None and j - i - 1 > keep)
            own = [a for a in order if a.stage == stage]
            reduced = [own[at + 1] for at, a in enumerate(own) if a.op is Op.REDUCE]
            gradients = [a for a in own if a.op in (Op.B, Op.W)]
            assert reduced == (gradients if reduce_each else gradients[-1:])


def test_gathers_are_staggered_and_repeated_before_the_backward() -> None:
    layers = Schedule.parse("0F0 1F0 2F0 2B0 1B0 0B0")  # three blocks on one rank
    assert str(lower(layers, Sharding(True, True, True, keep=0))) == (
        "0UNSHARD0 1UNSHARD0 0F0 0RESHARD0 2UNSHARD0 1F0 1RESHARD0 2F0 1UNSHARD1 2REDUCE0 2B0 2RESHARD0 "
        "0UNSHARD1 1REDUCE0 1B0 1RESHARD1 0REDUCE0 0B0 0RESHARD1"
    )


def test_a_backward_requires_the_parameters_of_its_visit() -> None:
    program = lower(Schedule.parse("0F0 1F0 1B0 0B0"), Sharding(True, True, True, keep=0))
    assert requires(Action.parse("0F0"), program)[0] == Action.parse("0UNSHARD0")
    assert requires(Action.parse("0B0"), program)[0] == Action.parse("0UNSHARD1")
    late = Schedule.parse("0UNSHARD0 0F0 0RESHARD0 0REDUCE0 0B0 0UNSHARD1 0RESHARD1")
    with pytest.raises(DeadlockError, match="0B0 waits for 0UNSHARD1"):
        simulate(late)


@pytest.mark.parametrize("sharding", [DDP, ZERO1, ZERO2])
def test_whole_parameters_are_not_let_go(sharding: Sharding) -> None:
    assert "RESHARD" not in str(lower(one_f_one_b(3, 4), sharding))
    assert lower(one_f_one_b(3, 4), sharding) == lower(one_f_one_b(3, 4))


def test_reads_like_a_score() -> None:
    assert str(lower(one_f_one_b(2, 2), FSDP)).splitlines() == [
        "0UNSHARD0 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0REDUCE0 0B1 0RESHARD0",
        "1UNSHARD0 1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1REDUCE0 1B1 1RESHARD0 1SEND_B1",
    ]
    assert str(lower(gpipe(1, 2))) == "0UNSHARD0 0F0 0F1 0B0 0REDUCE0 0B1"


def test_neighbouring_stages_on_one_rank_need_no_message() -> None:
    v_shape = Schedule.parse("0F0 3F0 3B0 0B0\n1F0 2F0 2B0 1B0")
    assert str(lower(v_shape)).splitlines() == [
        "0UNSHARD0 3UNSHARD0 0F0 0SEND_F0 3RECV_F0 3F0 3REDUCE0 3B0 3SEND_B0 0RECV_B0 0REDUCE0 0B0",
        "1UNSHARD0 2UNSHARD0 1RECV_F0 1F0 2F0 2SEND_F0 2RECV_B0 2REDUCE0 2B0 1REDUCE0 1B0 1SEND_B0",
    ]


def test_reduce_precedes_the_last_weight_gradient_also_when_split() -> None:
    assert str(lower(Schedule.parse("0F0 0I0 0F1 0I1 0W0 0W1"))).endswith("0W0 0REDUCE0 0W1")


def test_a_receive_is_posted_before_what_still_runs_when_its_sender_is_done() -> None:
    first_stage_takes = {2: "1RECV_F0 1F0 1RECV_F1 1B0", 4: "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1"}
    for times, order in first_stage_takes.items():  # 1B0 runs from 3 to 5 while 0F1 ends at 4, or 5 to 7 against 8
        assert order in str(lower(one_f_one_b(2, 2), cost=Cost(stages=(times, 1))))


def naive(s: Schedule) -> Schedule:
    """Messages placed by each rank for itself: receive before use, send after."""

    def rank(order: tuple[Action, ...]) -> tuple[Action, ...]:
        out: list[Action] = []
        for a in order:
            way, step = ("F", 1) if a.op is Op.F else ("B", -1)
            if 0 <= a.stage - step < s.num_stages:
                out.append(Action(a.stage, Op(f"RECV_{way}"), a.mb))
            out.append(a)
            if 0 <= a.stage + step < s.num_stages:
                out.append(Action(a.stage, Op(f"SEND_{way}"), a.mb))
        gradients = [at for at, a in enumerate(out) if a.op is Op.B]
        out.insert(gradients[-1], Action(order[0].stage, Op.REDUCE))
        return (Action(order[0].stage, Op.UNSHARD), *out)

    return replace(s, ranks=tuple(map(rank, s.ranks)))


def test_placing_messages_locally_deadlocks_and_is_rejected() -> None:
    """In 1F1B two neighbours send to each other at once. The test of the check: gpipe has no such turn."""
    check_lowered(naive(gpipe(4, 8)))
    with pytest.raises(DeadlockError, match="deadlock if sends block until received, at 0SEND_F1 1SEND_B0"):
        check_lowered(naive(one_f_one_b(2, 3)))
    check_lowered(lower(one_f_one_b(2, 3)))


@given(VALID, SHARDINGS, st.data())
def test_a_program_without_one_of_its_actions_is_rejected_by_name(
    s: Schedule, sharding: Sharding, data: st.DataObject
) -> None:
    program = lower(s, sharding)
    rank = data.draw(st.integers(0, s.num_ranks - 1))
    order = [*program.ranks[rank]]
    gone = order.pop(data.draw(st.integers(0, len(order) - 1)))
    broken = replace(program, ranks=(*program.ranks[:rank], tuple(order), *program.ranks[rank + 1 :]))
    verb = r"(is missing|must come)"
    with pytest.raises(ScheduleError, match=rf"(?m)^{gone} {verb}"):
        check_lowered(broken, sharding)


@given(GENERATED.filter(lambda s: s.num_ranks > 1 and s.num_microbatches > 1), st.data())
def test_messages_swapped_on_one_side_are_rejected(s: Schedule, data: st.DataObject) -> None:
    program = lower(s)
    op = data.draw(st.sampled_from(MESSAGES))
    stages = [stage for stage in range(s.num_stages) if Action(stage, op, 0) in program.actions]
    stage = data.draw(st.sampled_from(stages))
    a, b = data.draw(st.permutations(range(s.num_microbatches)))[:2]
    swap = {Action(stage, op, a): Action(stage, op, b), Action(stage, op, b): Action(stage, op, a)}
    swapped = replace(program, ranks=tuple(tuple(swap.get(x, x) for x in order) for order in program.ranks))
    with pytest.raises(ScheduleError, match=r"message \d+ from rank \d+ to rank \d+ is for"):
        check_lowered(swapped)


@pytest.mark.parametrize(
    ("program", "sharding", "message"),
    [
        ("0F0 0UNSHARD0 0REDUCE0 0B0", DDP, "0UNSHARD0 must come before 0F0"),
        ("0UNSHARD0 0REDUCE0 0F0 0B0", DDP, "0REDUCE0 must come directly before 0B0, the stage's last weight gradient"),
        ("0UNSHARD0 0F0 0I0 0REDUCE0 0F1 0I1 0W0 0W1", DDP, "0REDUCE0 must come directly before 0W1"),
        ("0UNSHARD0 0F0 0RESHARD0 0REDUCE0 0B0", FSDP, "0UNSHARD1 must come before 0B0"),
        ("0UNSHARD0 0F0 0REDUCE0 0B0 0RESHARD0", ZERO1, "0RESHARD0 is there, but the parameters are not sharded"),
        ("0UNSHARD0 0F0 0SEND_F0 0REDUCE0 0B0", DDP, "0SEND_F0 is a message that nothing needs"),
        ("0UNSHARD0 0REDUCE0 0B0 0F0", DDP, "deadlock: 0B0 waits for 0F0"),
    ],
)
def test_a_verb_out_of_place_is_rejected(program: str, sharding: Sharding, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_lowered(Schedule.parse(program), sharding)


@pytest.mark.parametrize(
    "flags", [(True, False, False), (True, False, True), (False, True, False), (True, True, False)]
)
def test_a_sharding_that_means_nothing_is_rejected(flags: tuple[bool, bool, bool]) -> None:
    with pytest.raises(ValueError, match=f"params={flags[0]}, grads={flags[1]}, state={flags[2]}: .* take DDP, ZERO1"):
        Sharding(*flags)
