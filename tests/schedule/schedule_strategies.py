"""Schedules nobody designed: any placement, any order that can happen, any backward split or whole."""

from hypothesis import strategies as st

from stretto.schedule import GENERATORS, Action, Op, Schedule, requires, schedule_for

GENERATED = st.builds(
    schedule_for,
    st.sampled_from(sorted(set(GENERATORS) - {"auto"})),
    st.integers(1, 6),
    st.integers(1, 10),
)


@st.composite
def any_schedule(draw: st.DrawFn) -> Schedule:
    """Stages anywhere, one action at a time drawn from all that could come next."""
    ranks = draw(st.integers(1, 4))
    extra = draw(st.lists(st.integers(0, ranks - 1), max_size=3))
    placement = tuple(draw(st.permutations([*range(ranks), *extra])))
    microbatches = draw(st.integers(1, 3))
    todo: set[Action] = set()
    for stage in range(len(placement)):
        for mb in range(microbatches):
            backward = draw(st.sampled_from([(Op.B,), (Op.I, Op.W)]))
            todo |= {Action(stage, op, mb) for op in (Op.F, *backward)}
    whole = Schedule(placement, microbatches, (tuple(todo),))
    waiting = {a: set(requires(a, whole)) for a in sorted(todo)}
    done: dict[Action, None] = {}
    while waiting:
        ready = [a for a, needs in waiting.items() if needs <= done.keys()]
        done[draw(st.sampled_from(ready))] = None
        waiting = {a: needs for a, needs in waiting.items() if a not in done}
    orders = (tuple(a for a in done if placement[a.stage] == rank) for rank in range(ranks))
    return Schedule(placement, microbatches, tuple(orders))
