"""A run that goes on with another mix: each corpus where it stood, exactly, in any layout.

Faults to catch: samples of a corpus counted from the change on; a corpus whose order follows its place in the list; a
stretch that forgets where it began; a corpus that comes back from its start; other text under an old path.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import fixed_dictionaries, integers, lists, sampled_from

from stretto.arguments import Arguments
from stretto.arguments.schema import BatchConfig, DataConfig
from stretto.data.errors import DataError
from stretto.data.feed import Feed
from stretto.data.mixture import Mix
from stretto.data.order import windows_of
from stretto.data.store import TokenStore, write_store
from stretto.data.streams import hashed
from stretto.data.text import Text

pytestmark = pytest.mark.gloo

NAMES = "abc"
SEQ = 2


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStore]:
    """Of 3, 5 and 9 windows, whose tokens say whose they are and where."""
    found = {}
    for number, name in enumerate(NAMES):
        path = tmp_path_factory.mktemp("stores") / name
        with write_store(path, vocab_size=1000, eod=999, fingerprint=name) as writer:
            writer.add(torch.arange(100 * number, 100 * number + SEQ * (3, 5, 9)[number]).numpy(), 1)
        found[name] = TokenStore.open(path)
    return found


def feed_of(stores: dict[str, TokenStore], shares: dict[str, int]) -> Feed:
    total = sum(shares.values())
    weights = tuple(Fraction(share, total) for share in shares.values())
    return Feed(Mix(tuple(stores[n] for n in shares), weights, tuple(f"/{n}" for n in shares)), seq_len=SEQ, seed=7)


def seen(feed: Feed, count: int) -> list[tuple[str, int]]:
    """Corpus and window of the next samples."""
    (batch,) = feed.batch(count, 0, 1, count) if count else (None,)
    labels = batch.labels[:, -1].tolist() if batch is not None else []
    return [(NAMES[label // 100], label % 100 // SEQ) for label in labels]


MIXES = lists(
    fixed_dictionaries({}, optional={name: sampled_from([1, 2, 3]) for name in NAMES}).filter(bool),
    min_size=2,
    max_size=4,
)


@given(mixes=MIXES, length=integers(0, 23), save_at=integers(0, 23), turn=sampled_from([1, -1]))
@settings(max_examples=40, deadline=None)
def test_each_corpus_goes_on_where_it_stood(
    stores: dict[str, TokenStore], mixes: list[dict[str, int]], length: int, save_at: int, turn: int
) -> None:
    """Whatever the mixes: all samples of a corpus, one after the other, are those of one order of its own."""
    samples: list[tuple[str, int]] = []
    state: dict[str, Any] | None = None
    for shares in mixes:
        for cut in (min(save_at, length), length - min(save_at, length)):  # a checkpoint within the stretch
            feed = feed_of(stores, dict([*shares.items()][::turn]))
            if state is not None:
                feed.load_state_dict(json.loads(json.dumps(state)))
            samples += seen(feed, cut)
            state = feed.state_dict()
        assert {name for name, _ in samples[len(samples) - length :]} <= set(shares)
    alone = next(iter(mixes[0])) if len(mixes[0]) == 1 else None
    came: list[str] = []
    for shares in mixes:
        came += [name for name in [*shares][::turn] if name not in came]
    for name in came:
        windows = [window for corpus, window in samples if corpus == name]
        numbered = [each for each in came if each != alone]
        seed = 7 if name == alone else hashed(f"stretto corpus 7 {numbered.index(name)}")
        n = (stores[name].header.tokens - 1) // SEQ
        assert windows == windows_of(0, len(windows), n, seed=seed).tolist()


@pytest.mark.parametrize(("dp", "micro"), [(2, 3), (6, 2), (3, 1)])
def test_every_layout_goes_on_alike(stores: dict[str, TokenStore], dp: int, micro: int) -> None:
    before = feed_of(stores, {"a": 1, "b": 2})
    before.batch(12, 0, 1, 12)
    state = before.state_dict()

    def rows(dp: int, micro: int) -> torch.Tensor:
        feeds = [feed_of(stores, {"c": 3, "b": 1, "a": 1}) for _ in range(dp)]
        for feed in feeds:
            feed.load_state_dict(state)
        ranks = [feed.batch(12, rank, dp, micro) for rank, feed in enumerate(feeds)]
        return torch.cat([batch.tokens for microbatch in zip(*ranks, strict=True) for batch in microbatch])

    assert torch.equal(rows(dp, micro), rows(1, 12))


def mix(stores: Sequence[TokenStore], paths: str, shares: str | None = "11", tokenizer: str = "t") -> Mix:
    weights = None if shares is None else tuple(Fraction(int(s), len(shares)) for s in shares)
    return Mix(tuple(stores), weights, tuple(paths), tokenizer)


def test_what_is_not_gone_on_with(stores: dict[str, TokenStore]) -> None:
    a, b, c = stores.values()
    state = Feed(mix([a, b], "ab"), seq_len=SEQ, seed=1).state_dict()
    together = Feed(mix([a, b], "ab", None), seq_len=SEQ, seed=1).state_dict()
    wrong: list[tuple[dict[str, Any], Mix, str]] = [
        (state, mix([a, c], "ab"), "b: digest was '.*', is '.*': a corpus that goes on must be the same text"),
        (state, mix([a, b], "ab", tokenizer="u"), "tokenizer was 't', is 'u'"),
        (state, mix([a, c], "ac", None), "2 corpora without shares"),
        (together, mix([a, c], "ac"), "2 corpora without shares"),
        ({**state, "weights": ["1/0", "1"]}, mix([a, c], "ac"), "does not say what the mix was"),
        ({**state, "weights": ["1/999999", "999998/999999"]}, mix([a, c], "ac"), "does not say what the mix was"),
        ({**state, "weights": ["1/2", "1/4", "1/4"]}, mix([a, c], "ac"), "does not say what the mix was"),
        ({**state, "stretch": {"begun": -1, "streams": [], "left": []}}, mix([a, b], "ab"), "where each corpus stands"),
        ({k: x for k, x in state.items() if k != "stretch"}, mix([a, c], "ac"), "digest was"),
    ]
    for said, other, problem in wrong:
        feed = Feed(other, seq_len=SEQ, seed=1)
        with pytest.raises(DataError, match=problem):
            feed.load_state_dict(said)
        assert feed.consumed == 0
    Feed(mix([a, b], "ab", None), seq_len=SEQ, seed=1).load_state_dict(together)


def test_a_corpus_is_added_by_the_words_of_a_run(text_dir: Path, tmp_path: Path) -> None:
    """From the words to the rows: the first corpus goes on, and a moved one is known by its text."""
    other = tmp_path / "other.txt"
    other.write_text("other words\n" * 400)

    def feed(data: str) -> Feed:
        where = DataConfig(data=data, cache=str(tmp_path / "cache"), held_out=0.0)
        text = Text.open(Arguments(data=where, batch=BatchConfig(seq_len=8)))
        return Feed(text.mix, seq_len=8, seed=3)

    before = feed(str(text_dir))
    first = before.batch(10, 0, 1, 10)[0].tokens
    state = before.state_dict()
    rest = before.batch(10, 0, 1, 10)[0].tokens
    after = feed(f"{other}:0.5,{text_dir}:0.5")
    after.load_state_dict(state)
    rows = after.batch(20, 0, 1, 20)[0].tokens
    of_first = rows[[row.tolist() not in feed(str(other)).batch(600, 0, 1, 600)[0].tokens.tolist() for row in rows]]
    assert torch.equal(of_first, rest)
    assert not torch.equal(of_first, first)
