"""Blocks on stages, cut between attention and feed-forward: each sublayer once, in order, and only for a gain."""

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.layout.stages import placement
from stretto.schedule import partition
from stretto.schedule.blocks import StageBlock, Sublayers, blocks_of, blocks_text, counts_text, cut_layers
from stretto.schedule.cut import WORTH, busiest, layers_by_cost
from stretto.schedule.measured import cost_text, read_layers
from stretto.schedule.partition import balanced, layers_of
from stretto.schedule.pieces import Pieces, cost_for
from stretto.schedule.placements import layers_under, search_layers

pytestmark = pytest.mark.pure

ATTENTION = st.floats(0.05, 0.95)
ENDS = st.floats(0, 4) | st.sampled_from([0.0, 0.5, 0.6])


@given(st.lists(st.integers(0, 7), max_size=6))
def test_each_sublayer_is_on_one_stage_in_order(halves: list[int]) -> None:
    """Catches: a cut block whose second half begins a layer too late, an empty stage with a block."""
    held = blocks_of(tuple(n / 2 for n in halves))
    sublayers = [
        (block.layer, which)
        for blocks in held
        for block in blocks
        for which, here in (("attention", block.attention), ("mlp", block.feed_forward))
        if here
    ]
    assert sublayers == [(n // 2, ("attention", "mlp")[n % 2]) for n in range(sum(halves))]
    assert [sum(b.attention + b.feed_forward for b in blocks) for blocks in held] == halves
    cut = {b.layer for blocks in held for b in blocks if not b.whole}
    assert cut == set(cut_layers([n / 2 for n in halves]))


def test_reads_like_a_plan() -> None:
    stages = blocks_of((4.5, 0.0, 3.5))
    assert stages[0][-1] == StageBlock(4, Sublayers.ATTENTION)
    assert [blocks_text(each) for each in stages] == ["0..3, attention of 4", "none", "feed-forward of 4, 5..7"]
    assert [blocks_text(each) for each in blocks_of((0.5, 0.5, 1))] == ["attention of 0", "feed-forward of 0", "1"]
    assert counts_text((4.5, 0.0, 3.5)) == "4.5,0,3.5"
    for wrong in (0.25, -0.5):
        with pytest.raises(ValueError, match="whole, or in halves"):
            blocks_of((wrong, 1 - wrong))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("Et*4a|ft*3L", (4.5, 3.5)),
        ("Etaf|t|L", (2, 1, 0)),
        ("Ea||f|a|ftL", (0.5, 0, 0.5, 0.5, 1.5)),
        ("E(a|f)*2|L", (0.5, 1, 0.5, 0)),
    ],
)
def test_a_compact_layout_with_halves(text: str, layers: tuple[float, ...]) -> None:
    assert layers_of(text) == layers


@pytest.mark.parametrize("text", ["Ea|tL", "Ef|aL", "Eta|L", "Ea|a|f|fL", "E|fL"])
def test_half_of_a_layer_without_the_other_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="behind each a"):
        layers_of(text)


@given(st.integers(1, 6), st.integers(2, 4), ATTENTION, ENDS, ENDS)
def test_no_cut_is_better(layers: int, stages: int, attention: float, embedding: float, head: float) -> None:
    """By the most costly stage, then by the sum of squares, against every split into halves that there is."""

    def costs(halves: tuple[int, ...]) -> tuple[float, float]:
        each = [
            sum(attention * b.attention + (1 - attention) * b.feed_forward for b in blocks)
            for blocks in blocks_of(tuple(n / 2 for n in halves))
        ]
        each[0] += embedding
        each[-1] += head
        return round(max(each), 7), sum(x * x for x in each)

    n = 2 * layers
    every = [
        tuple(b - a for a, b in zip((0, *cuts), (*cuts, n), strict=True))
        for cuts in combinations_with_replacement(range(n + 1), stages - 1)
    ]
    best = min(map(costs, every))
    ours = balanced(layers, stages, (embedding, head), attention)
    found = costs(tuple(int(2 * count) for count in ours))
    assert found == (pytest.approx(best[0], abs=1e-6), pytest.approx(best[1], abs=1e-3))


@given(
    st.integers(0, 40),
    st.integers(1, 6),
    st.sampled_from([(1, "loop"), (2, "loop"), (2, "v"), (3, "loop")]),
    ATTENTION,
    ENDS,
)
def test_blocks_are_cut_for_a_gain_alone(
    layers: int, pp: int, place: tuple[int, str], attention: float, head: float
) -> None:
    """Catches: cuts that gain nothing, a gain by stage that is none by rank."""
    home = placement(pp, *place) if pp > 1 or place[1] == "loop" else placement(pp, place[0])
    found = layers_by_cost(layers, home, attention=attention, head=head)
    whole = layers_by_cost(layers, home, head=head)
    assert sum(found) == layers
    assert whole == tuple(len(held) for held in partition(layers, len(home), head=head))
    if cut_layers(found):
        before, after = (busiest(counts, home, attention, (0.0, head)) for counts in (whole, found))
        assert after < before * (1 - WORTH)
    else:
        assert found == whole


def test_what_a_cut_is_worth_to_a_model_of_eight_layers() -> None:
    """The shape D4 of the benchmarks: its head takes as much as 0.5 of a layer, attention 0.3 of one."""
    assert layers_by_cost(8, (0, 1), attention=0.3, head=0.52) == (4.5, 3.5)
    assert layers_by_cost(8, (0, 1, 0, 1), attention=0.3, head=0.52) == (2.0, 2.0, 2.5, 1.5)
    assert layers_by_cost(8, (0, 1), attention=0.3, head=0.0) == (4.0, 4.0)  # nothing to gain
    assert layers_by_cost(8, (0, 1), head=0.52) == (4.0, 4.0)  # a block that cannot be cut


PIECES = Pieces((1.0, 1.2, 0.9), head=(1.6, 0.0, 0.0), shares=(0.3, 0.5 / 1.2, 0.2 / 0.9))


def test_costs_of_cut_blocks_follow_from_their_sublayers() -> None:
    """Catches: halves that cost half, a head or an embedding that is counted by halves too."""
    cost = PIECES.cost((1.5, 0.5))
    assert cost.forward == pytest.approx((1.3, 0.7 + 1.6))
    assert cost.input_gradient == pytest.approx((1.7, 0.7))
    assert cost.weight_gradient == pytest.approx((1.1, 0.7))
    assert PIECES.loads((1.5, 0.5)) == pytest.approx([4.1 / 3.1, 3.7 / 3.1])
    with pytest.raises(ValueError, match="not known what attention takes"):
        Pieces((1.0, 1.0, 1.0)).cost((1.5, 0.5))


@given(st.lists(st.integers(0, 6), min_size=2, max_size=5))
def test_measured_costs_of_cut_blocks_give_those_of_other_splits(halves: list[int]) -> None:
    layers = tuple(n / 2 for n in halves)
    if not sum(halves[1:-1]) or sum(halves) % 2:
        return
    text = cost_text(PIECES.cost(layers), layers)
    assert read_layers(text) == layers
    found = cost_for(text, "x", (1, 0.5, 0.5), PIECES.shares)
    assert found.forward == pytest.approx(PIECES.cost((1, 0.5, 0.5)).forward)
    assert found.weight_gradient == pytest.approx(PIECES.cost((1, 0.5, 0.5)).weight_gradient)


def test_a_search_cuts_blocks_where_a_step_is_shorter_for_it() -> None:
    """Never longer than with whole layers; catches halves that are not tried, or taken for nothing."""
    whole = Pieces(PIECES.layer, head=PIECES.head)
    for name, v, shape in (("1f1b", 1, "loop"), ("interleaved", 2, "loop"), ("zbv", 2, "v")):
        cut, plain = (layers_under(name, each, 8, 2, v, shape, 8) for each in (PIECES, whole))  # type: ignore[arg-type]
        assert cut.layers is not None
        assert cut_layers(cut.layers)
        assert cut.found.time < plain.found.time * (1 - WORTH)
    assert search_layers(PIECES, 8, 2, 1, 8).found.time < search_layers(whole, 8, 2, 1, 8).found.time * (1 - WORTH)
    even = Pieces((1.0, 1.0, 1.0), shares=(0.3, 0.3, 0.3))
    assert layers_under("1f1b", even, 8, 2, 1, "loop", 8).layers == (4, 4)
