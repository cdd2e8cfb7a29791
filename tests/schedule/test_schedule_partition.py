"""Layers on stages: each once, in order, and no split with a cheaper worst stage."""

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.schedule import partition
from stretto.schedule.partition import layers_of

pytestmark = pytest.mark.pure

COSTS = st.floats(0, 5) | st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0])


def counts(layers: int, stages: int, embedding: float = 0.0, head: float = 0.0) -> list[int]:
    return [len(stage) for stage in partition(layers, stages, embedding=embedding, head=head)]


def stage_costs(sizes: list[int], embedding: float, head: float) -> list[float]:
    costs = [float(size) for size in sizes]
    costs[0] += embedding
    costs[-1] += head
    return sorted(costs, reverse=True)


@given(st.integers(0, 200), st.integers(1, 40), COSTS, COSTS)
def test_every_layer_once_in_order(layers: int, stages: int, embedding: float, head: float) -> None:
    split = partition(layers, stages, embedding=embedding, head=head)
    assert len(split) == stages
    assert [layer for stage in split for layer in stage] == list(range(layers))


@given(st.integers(0, 9), st.integers(1, 5), COSTS, COSTS)
def test_no_split_is_better(layers: int, stages: int, embedding: float, head: float) -> None:
    """By the most costly stage, then by the next, against every split there is."""
    best = min(
        stage_costs([b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True)], embedding, head)
        for cuts in combinations_with_replacement(range(layers + 1), stages - 1)
    )
    ours = stage_costs(counts(layers, stages, embedding=embedding, head=head), embedding, head)
    assert ours == pytest.approx(best, abs=1e-8)


def test_reads_like_a_plan() -> None:
    assert partition(10, 4) == (range(2), range(2, 5), range(5, 8), range(8, 10))
    assert counts(9, 4) == [2, 2, 3, 2]
    assert counts(11, 4) == [3, 3, 3, 2]
    assert counts(3, 2) == [2, 1]
    assert counts(5, 1) == [5]
    assert counts(2, 4) == [0, 1, 1, 0]
    assert counts(1, 2) == [1, 0]
    assert counts(32, 4, head=1.5, embedding=0.2) == [8, 8, 9, 7]
    assert counts(4, 3, head=10.0) == [2, 2, 0]


def test_costs_that_differ_by_rounding_alone_are_a_tie() -> None:
    assert counts(2, 3, embedding=0.1 + 0.2, head=0.3) == counts(2, 3, embedding=0.3, head=0.1 + 0.2) == [1, 1, 0]


def test_an_explicit_list_is_obeyed() -> None:
    assert partition(5, 3, explicit=(4, 0, 1), head=9.0) == (range(4), range(4, 4), range(4, 5))


@pytest.mark.parametrize(
    ("explicit", "message"),
    [
        ((2, 2, 1), r"\[2, 2, 1\]: it names 3 stages, the pipeline has 2; \[3, 2\] would do"),
        ((2, 2), r"\[2, 2\]: it sums to 4, the model has 5 layers; \[3, 2\] would do"),
        ((6, -1), r"\[6, -1\]: a stage cannot hold fewer than 0 layers"),
        ((), r"\[\]: it names 0 stages, the pipeline has 2; it sums to 0, the model has 5 layers"),
    ],
)
def test_an_explicit_list_that_does_not_add_up(explicit: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(5, 2, explicit=explicit)


@pytest.mark.parametrize(("layers", "stages"), [(-1, 2), (4, 0)])
def test_sizes_that_are_none(layers: int, stages: int) -> None:
    with pytest.raises(ValueError, match=f"cannot place {layers} layers on {stages} stages"):
        partition(layers, stages)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_none(cost: float) -> None:
    with pytest.raises(ValueError, match=f"embedding={cost}, head=0.0"):
        partition(4, 2, embedding=cost)
    with pytest.raises(ValueError, match=f"embedding=0.0, head={cost}"):
        partition(4, 2, head=cost)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("Et*3|(tt|)*2t|L", (3, 2, 2, 1, 0)),
        ("Et*3|(tt|)*29,t|L", (3, *[2] * 29, 1, 0)),
        ("E|t|tL", (0, 1, 1)),
        ("Et*4|(t*4|)*2t*4L", (4, 4, 4, 4)),
        ("E||ttL", (0, 0, 2)),
        ("EttL", (2,)),
    ],
)
def test_a_compact_layout(text: str, layers: tuple[int, ...]) -> None:
    assert layers_of(text) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t|L", "must begin with the embedding"),
        ("Et|Et|L", "must begin with the embedding, E, and have no other"),
        ("Et|tL|t", "must end with the loss"),
        ("Et|m|L", "blocks of --mtp-layers lie before the head in any case"),
        ("Et*|L", "a number must follow"),
        ("Et*99999999|L", "a number must follow"),
        ("E(t|L", "needs its"),
        ("E((t)*2)*2|L", "none inside another"),
        ("*3E|L", "nothing stands before"),
        ("Ex|L", "has x: there are E, t, a, f, L"),
    ],
)
def test_a_compact_layout_that_is_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers_of(text)
