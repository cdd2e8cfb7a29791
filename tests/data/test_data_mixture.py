"""A mix of corpora: exact over any stretch, a function of seed and samples consumed, the same in every layout.

Faults to catch: a corpus that gets ahead of its share; a place that is counted from the start of a batch; two corpora
shuffled alike; windows of a corpus that are left out at the start.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers, lists, sampled_from

from stretto.arguments import Arguments
from stretto.arguments.schema import DataConfig
from stretto.data.errors import DataError
from stretto.data.feed import Feed
from stretto.data.mixture import EndToEnd, Mix, Turns, turns
from stretto.data.prepare import Splits
from stretto.data.text import Text

pytestmark = pytest.mark.gloo

WEIGHTS = lists(integers(1, 12), min_size=2, max_size=5)


def fractions(parts: list[int]) -> tuple[Fraction, ...]:
    return tuple(Fraction(part, sum(parts)) for part in parts)


@given(parts=WEIGHTS, first=integers(0, 5000), count=integers(1, 300), seed=integers(0, 50))
def test_any_stretch_has_each_share_to_within_two_samples(parts: list[int], first: int, count: int, seed: int) -> None:
    """Catches: a share that is only right on average, or at multiples of something."""
    weights = fractions(parts)
    corpora, _ = Turns([100] * len(parts), weights, seed).places(first, count)
    for corpus, weight in enumerate(weights):
        off = abs(int((corpora == corpus).sum()) - weight * count)
        assert off < 2
        assert off <= 1 or len(parts) > 2


@given(parts=WEIGHTS)
def test_every_prefix_of_the_pattern_is_within_one(parts: list[int]) -> None:
    pattern = turns(fractions(parts))
    for corpus, weight in enumerate(fractions(parts)):
        ahead = np.cumsum(pattern == corpus) - np.arange(1, len(pattern) + 1) * float(weight)
        assert np.abs(ahead).max() < 1
        assert ahead[-1] == pytest.approx(0)


@given(parts=WEIGHTS, first=integers(0, 3000), count=integers(1, 60), seed=integers(0, 50))
def test_a_sample_does_not_depend_on_where_one_begins(parts: list[int], first: int, count: int, seed: int) -> None:
    """Catches: a place that is counted from the start of a batch."""
    order = Turns([7 + i for i in range(len(parts))], fractions(parts), seed)
    corpora, windows = order.places(first, count)
    one = [order.places(k, 1) for k in range(first, first + count)]
    assert corpora.tolist() == [int(corpus[0]) for corpus, _ in one]
    assert windows.tolist() == [int(window[0]) for _, window in one]


@given(parts=WEIGHTS, seed=integers(0, 20))
def test_each_corpus_has_epochs_of_its_own_shuffled_anew(parts: list[int], seed: int) -> None:
    """Catches: windows that come twice in an epoch or never, two epochs or two corpora in one order."""
    order = Turns([11] * len(parts), fractions(parts), seed)
    corpora, windows = order.places(0, 40 * sum(parts))
    seen = []
    for corpus in range(len(parts)):
        mine = windows[corpora == corpus].tolist()
        assert len(mine) / 11 == pytest.approx(order.epochs(len(windows))[corpus])
        epochs = [mine[i : i + 11] for i in range(0, len(mine) - 10, 11)]
        assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
        seen += [tuple(epoch) for epoch in epochs[:3]]
    assert len(set(seen)) == len(seen)


@given(sizes=lists(integers(1, 9), min_size=1, max_size=4), seed=integers(0, 20))
def test_without_weights_every_window_comes_once_in_an_epoch(sizes: list[int], seed: int) -> None:
    order = EndToEnd(sizes, seed)
    total = sum(sizes)
    for epoch in range(2):
        corpora, windows = order.places(epoch * total, total)
        expected = [(corpus, window) for corpus, size in enumerate(sizes) for window in range(size)]
        assert sorted(zip(corpora.tolist(), windows.tolist(), strict=True)) == expected


@given(
    split=sampled_from([(1, 1, 12), (2, 3, 2), (3, 1, 4), (6, 2, 1), (1, 12, 1)]),
    weights=sampled_from([None, (Fraction(7, 10), Fraction(3, 10)), (Fraction(1, 3), Fraction(2, 3))]),
    before=integers(0, 40),
)
def test_the_mix_is_the_same_in_every_layout_and_after_a_resume(
    splits: Splits, split: tuple[int, int, int], weights: tuple[Fraction, ...] | None, before: int
) -> None:
    dp, micro, _ = split
    mix = Mix((splits.train, splits.held_out), weights)

    def rows(dp: int, micro: int, consumed: int) -> torch.Tensor:
        feeds = [Feed(mix, seq_len=8, seed=5) for _ in range(dp)]
        state = {**feeds[0].state_dict(), "consumed": consumed}
        for feed in feeds:
            feed.load_state_dict(state)
        ranks = [feed.batch(12, rank, dp, micro) for rank, feed in enumerate(feeds)]
        assert all(feed.consumed == consumed + 12 for feed in feeds)
        return torch.cat([batch.tokens for microbatch in zip(*ranks, strict=True) for batch in microbatch])

    one = rows(1, 1, before)
    assert torch.equal(rows(dp, micro, before), one)
    later = Feed(mix, seq_len=8, seed=5)
    for _ in range(before):
        later.batch(1, 0, 1, 1)
    assert torch.equal(later.batch(12, 0, 1, 12)[0].tokens, one)


def test_one_corpus_is_read_as_without_a_mix(splits: Splits) -> None:
    """Catches: another order for runs that have one corpus, whose checkpoints would go on with other rows."""
    one, mixed = (Feed(text, seq_len=8, seed=5) for text in (splits.train, Mix((splits.train,), (Fraction(1),))))
    assert torch.equal(one.batch(9, 0, 1, 9)[0].tokens, mixed.batch(9, 0, 1, 9)[0].tokens)


@pytest.mark.parametrize(
    ("text", "problem"), [("a:0.5,b", "b without a weight, the others with one"), ("a:0,b:1", "a with weight 0")]
)
def test_a_mix_that_is_none_is_told(text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        Text.open(Arguments(data=DataConfig(data=text)))


def test_each_corpus_of_a_mix_has_a_validation_set(text_dir: Path, tmp_path: Path) -> None:
    """Catches: two corpora of one name, a validation set that is lost."""
    other = tmp_path / "other" / text_dir.name
    other.mkdir(parents=True)
    for i in range(9):
        (other / f"{i}.txt").write_text(f"other {i}\n" * 9)
    data = f"{text_dir}:0.75,{other}:0.25"
    args = Arguments(data=DataConfig(data=data, cache=str(tmp_path / "cache"), held_out=0.3, eval_data=f"x={other}"))
    text = Text.open(args)
    assert [source.name for source in text.sources] == ["songbook", "songbook-2"]
    assert [each.name for each in text.eval_sets] == ["songbook", "songbook-2", "x"]
    assert text.eval_sets[2].store.header.documents == 9
    assert text.mix.weights == (Fraction(3, 4), Fraction(1, 4))
