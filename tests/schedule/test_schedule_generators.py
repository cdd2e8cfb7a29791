"""Every schedule: the figures of its paper, and for 1F1B the order that a well-known trainer runs."""

import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import GENERATED

from stretto.arguments.schema import ParallelConfig
from stretto.layout.stages import placement
from stretto.schedule import (
    DDP,
    FSDP,
    GENERATORS,
    ZERO2,
    Cost,
    Op,
    Schedule,
    Sharding,
    bubble,
    check,
    check_lowered,
    draw,
    families,
    gpipe,
    lower,
    makespan,
    one_f_one_b,
    peak_live,
    schedule_for,
    simulate,
    step_time,
)
from stretto.schedule.sharding import MODES

pytestmark = pytest.mark.pure

SIZES = {"p": st.integers(1, 8), "m": st.integers(1, 16)}
RECORDED = json.loads((Path(__file__).parent.parent / "golden" / "one_f_one_b_orders.json").read_text())["cases"]


def test_reads_like_the_paper() -> None:
    assert draw(one_f_one_b(2, 3)) == "0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1B0 1F1 1B1 1F2 1B2"
    assert draw(gpipe(2, 2)) == "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1"


@given(**SIZES)
def test_bubble_is_the_textbook_one(p: int, m: int) -> None:
    # Narayanan et al. 2021, section 2.2: bubble over ideal time is (p-1)/m for both, so over all time:
    for s in (gpipe(p, m), one_f_one_b(p, m)):
        assert bubble(simulate(s)) == pytest.approx((p - 1) / (m + p - 1))


@given(**SIZES)
def test_activations_held_are_the_textbook_ones(p: int, m: int) -> None:
    assert peak_live(simulate(gpipe(p, m))) == (m,) * p
    assert peak_live(simulate(one_f_one_b(p, m))) == tuple(min(p - rank, m) for rank in range(p))


def figures(name: str, p: int, m: int, v: int, cost: Cost | None = None) -> tuple[float, int]:
    """Time of all ranks' idling until the last action ends, by rank, in forwards of a stage; most activations."""
    timeline = simulate(schedule_for(name, p, m, v), cost)
    busy = float((timeline.end - timeline.start).sum()) / p
    return makespan(timeline) - busy, max(peak_live(timeline))


VPP = st.integers(2, 4)


@given(**SIZES, v=VPP)
def test_interleaving_divides_the_bubble(p: int, m: int, v: int) -> None:
    """Narayanan et al. 2021, section 2.2.2: a bubble of (p-1)(F+B)/v; and 2(p-1) + (v-1)p + 1 activations of a stage.

    A forward of one of v stages takes 1/v of one of all layers, so in units of a stage's forward the v goes.
    Lamy-Poirier 2022, section 4: breadth-first idles as long.
    """
    idle, live = figures("interleaved", p, m * p, v)
    assert idle == pytest.approx(3 * (p - 1))
    assert live == min(2 * (p - 1) + (v - 1) * p + 1, v * m * p)
    assert figures("depth-first", p, m * p, v) == (pytest.approx(idle), live)
    assert figures("looped-bfs", p, m * p, v) == (pytest.approx(idle), v * m * p)
    if m >= p:  # not whole groups of p either
        assert figures("interleaved", p, m, v)[0] == pytest.approx(3 * (p - 1))


@given(p=st.integers(1, 8), more=st.integers(0, 20), f=st.integers(1, 4), i=st.integers(1, 4), w=st.integers(1, 4))
def test_zero_bubble_is_what_the_paper_says(p: int, more: int, f: int, i: int, w: int) -> None:
    """Qi et al. 2023, table 2 and section 2.3: bubbles (p-1)(F+B-W) of H1 with p activations, and of H2, without the
    barrier, (p-1)(F+B-2W) with 2p-1, where W is no longer than F or B (our I)."""
    w = min(w, f, i)
    cost = Cost.split(float(f), float(i), float(w))
    idle, live = figures("zb-h1", p, 2 * p + more, 1, cost)
    assert (idle, live) == (pytest.approx((p - 1) * (f + i - w)), p)
    timeline = simulate(schedule_for("zb-h2", p, 2 * p + more), cost)
    work = (2 * p + more) * (f + i + w)
    if f == i == w:
        assert step_time(timeline, barrier=False) == pytest.approx(work)
    assert max(peak_live(timeline)) == 2 * p - 1


@given(p=st.integers(2, 12), more=st.integers(0, 20), v=VPP)
def test_interleaved_zero_bubble_has_only_the_skew(p: int, more: int, v: int) -> None:
    """No paper's formula: p - 1, the skew of the ranks, is the least there is; (v-1)g + p activations of a stage."""
    m = 2 * p + more
    group = -(-m // (m // p))
    assert figures("interleaved-zb", p, m, v) == (pytest.approx(p - 1), (v - 1) * group + p)


@pytest.mark.parametrize("p", range(2, 17))
def test_the_v_family_is_what_the_paper_says(p: int) -> None:
    """Qi et al. 2024, table 1, with F = I = W: of 1F1B's bubble of 6(p-1) forwards of a stage, V-Min has two thirds,
    V-Half half, V-ZB none (but for the skew of p - 1, with the barrier); at (p+4)//3, (p+2)//2 and p microbatches'
    activations, of two stages each. The paper says "about": V-Min differs by 2 and the others by 1 for some p."""
    m = 3 * p
    assert figures("v-min", p, m, 2) == (pytest.approx(4 * p - 5, abs=2), pytest.approx((p + 4) // 3 * 2, abs=1))
    assert figures("v-half", p, m, 2) == (pytest.approx(3 * (p - 1), abs=1), pytest.approx((p + 2) // 2 * 2, abs=1))
    assert figures("zbv", p, m, 2) == (pytest.approx(p - 1, abs=1), 2 * p)


@given(p=st.integers(1, 10), more=st.integers(0, 12), f=st.integers(2, 4), w=st.integers(1, 2))
def test_dualpipev_is_what_its_authors_say(p: int, more: int, f: int, w: int) -> None:
    """DeepSeek-AI 2025, DualPipe, table of the readme: a bubble of (p-1)(F&B + B - 3W) for p ranks, where F&B is F + B
    as nothing overlaps inside, and 2p + 1 activations of a stage."""
    cost = Cost.split(float(f), float(f), float(w))
    idle, live = figures("dualpipev", p, 2 * p + more, 2, cost)
    whole = f + w
    assert idle <= (p - 1) * (f + whole + whole - 3 * w) + 1e-9
    assert live == 2 * p + 1


LARGE = {"p": st.integers(1, 16), "m": st.integers(1, 64), "v": st.integers(1, 4)}


@given(name=st.sampled_from(sorted(GENERATORS)), sharding=st.sampled_from([DDP, ZERO2, FSDP]), **LARGE)
def test_every_schedule_of_any_size_is_one(name: str, sharding: Sharding, p: int, m: int, v: int) -> None:
    """Catches groups that do not divide m, warm-ups too short, a W before its I: all that the checkers know."""
    s = schedule_for(name, p, m, v if GENERATORS[name].any_stages else None)
    assert (s.num_ranks, s.num_microbatches) == (p, m)
    assert s.placement == placement(p, s.num_stages // p, GENERATORS[name].shape_of(s.num_stages // p))
    check(s)
    check_lowered(lower(s, sharding), sharding)


@given(p=st.integers(1, 8), m=st.integers(1, 24), v=st.integers(1, 4), group=st.integers(1, 12))
def test_groups_may_have_any_size(p: int, m: int, v: int, group: int) -> None:
    for make in (families.interleaved, families.interleaved_zb):
        check(make(p, v, m, max(group, min(p, m))))


@given(GENERATED)
def test_every_forward_and_backward_is_there_once(s: Schedule) -> None:
    check(s)
    for rank, order in enumerate(s.ranks):
        backward = [a for a in order if a.op is Op.B] + [a for a in order if a.op is Op.W]
        for found in ([a for a in order if a.op is Op.F], backward):
            assert sorted((a.stage, a.mb) for a in found) == [
                (stage, mb)
                for stage in range(s.num_stages)
                if s.placement[stage] == rank
                for mb in range(s.num_microbatches)
            ]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"pp{case['pp']}-m{case['num_microbatches']}")
def test_1f1b_is_the_order_a_peer_runs(case: dict) -> None:  # type: ignore[type-arg]
    s = one_f_one_b(case["pp"], case["num_microbatches"])
    for stage, (ours, theirs) in enumerate(zip(s.ranks, case["ranks"], strict=True)):
        assert [f"{a.op}{a.stage - stage}.{a.mb}" for a in ours] == theirs["order"]
        first_backward = next(at for at, a in enumerate(ours) if a.op is Op.B)
        # The peer does not count the forward that the first backward directly follows, unless all are warm-up.
        assert first_backward == min(theirs["warmup"] + 1, s.num_microbatches)


def test_names() -> None:
    assert schedule_for("1f1b", 3, 4) == one_f_one_b(3, 4)
    assert schedule_for("gpipe", 3, 4) == gpipe(3, 4)
    assert set(GENERATORS) == set(get_args(get_type_hints(ParallelConfig)["schedule"]))
    with pytest.raises(ValueError, match="no schedule is named 'zigzag'; there are: 1f1b, auto, depth-first"):
        schedule_for("zigzag", 2, 2)


def test_modes_of_sharding() -> None:
    """Catches a mode that no setting names, or a setting without one."""
    literal, _ = get_args(get_type_hints(ParallelConfig)["sharding"])
    assert tuple(MODES) == get_args(literal)


@pytest.mark.parametrize(("p", "m"), [(0, 1), (1, 0), (-1, 4)])
@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_sizes_must_be_positive(name: str, p: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"{p} ranks and {m} microbatches: both must be at least 1"):
        schedule_for(name, p, m)
