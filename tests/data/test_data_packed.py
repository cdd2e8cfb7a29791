"""P7. Rows of whole documents: each token is predicted once, from its own document, and next to nothing is wasted.

Faults to catch: a document that begins in the slot before; a first token that is not predicted; a piece that fits and
is not put in; pieces of one length that fill a row beyond its end; an evaluation that leaves a document out.
"""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.data.errors import DataError
from stretto.data.evaluation import held_out_batches
from stretto.data.feed import Feed
from stretto.data.mixture import Mix
from stretto.data.packed import PackedRows
from stretto.data.store import TokenStore, write_store
from stretto.sequence import pack, waste

pytestmark = pytest.mark.gloo

EOD, VOCAB = 0, 500


def store_of(path: Path, lengths: list[int]) -> TokenStore:
    """Documents whose every token is its own."""
    with write_store(path / "text.tokens", vocab_size=VOCAB, eod=EOD, fingerprint="") as writer:
        first = 1
        for length in lengths:
            writer.add(np.arange(first, first + length), length)
            first += length
    return TokenStore.open(path / "text.tokens")


def test_each_token_is_predicted_once_from_its_own_document(tmp_path: Path) -> None:
    """A longer document is cut into rows, and goes on in the next from its own token."""
    lengths = [5, 1, 40, 0, 7, 7, 3, 15, 16, 17]
    packed = PackedRows(store_of(tmp_path, lengths), 16)
    batch = packed.batch(np.arange(len(packed)))
    assert batch.starts is not None
    seen: Counter[int] = Counter()
    at = np.arange(16)
    for tokens, labels, counts, starts in zip(
        batch.tokens.numpy(), batch.labels.numpy(), batch.loss_mask.numpy(), batch.starts.numpy(), strict=True
    ):
        seen.update(labels[counts].tolist())
        inside = counts[:-1] & counts[1:] & (starts[1:] == starts[:-1])
        assert (labels[:-1][inside] == tokens[1:][inside]).all(), "within a document the next token is the label"
        assert ((starts <= at) & (starts[starts] == starts)).all()
        follows = (labels == tokens + 1) | (labels == EOD) | (tokens == EOD)
        assert follows[counts].all(), "nothing predicts the document after it"
    assert seen == Counter(dict.fromkeys(range(1, sum(lengths) + 1), 1)) + Counter({EOD: len(lengths)})


def test_what_an_answer_is_not_counts_in_no_row(tmp_path: Path) -> None:
    """Catches a question that is learned, or a token whose mark is taken for a part of it."""
    with write_store(tmp_path / "chat.tokens", vocab_size=VOCAB, eod=EOD, fingerprint="", masked=True) as writer:
        writer.add(np.array([~1, ~2, 3, 4]), 4)
        writer.add(np.array([~5, 6]), 2)
    batch = PackedRows(TokenStore.open(tmp_path / "chat.tokens"), 12).batch(np.arange(1))
    assert set(batch.tokens[0].tolist()) == {EOD, 1, 2, 3, 4, 5, 6}
    assert sorted(batch.labels[batch.loss_mask].tolist()) == [3, 4, 6]


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 25))
def test_pieces_of_all_documents_fit_into_rows(lengths: list[int], row: int) -> None:
    firsts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = pack(np.array(lengths, np.int64), firsts[:-1], row)
    assert all(0 < sum(piece.length for piece in pieces) <= row for pieces in rows)
    taken = sorted(token for pieces in rows for p in pieces for token in range(p.first, p.first + p.length))
    assert taken == list(range(sum(lengths)))
    half = sum(sum(p.length for p in pieces) * 2 <= row for pieces in rows)
    assert half <= 1, "two rows that are half empty would have been one"


@given(st.lists(st.integers(1, 25), max_size=60), st.integers(1, 25))
def test_rows_are_filled_as_by_one_piece_after_another(lengths: list[int], row: int) -> None:
    """Catches pieces of one length that go into more rows together than each for itself."""
    room = [0] * sum(length // row for length in lengths)
    for length in sorted((n % row for n in lengths if n % row), reverse=True):
        fits = [n for n, left in enumerate(room) if left >= length]
        if not fits:
            fits, room = [len(room)], [*room, row]
        room[min(fits, key=lambda n: room[n])] -= length
    sizes = np.array(lengths, np.int64)
    rows = pack(sizes, np.cumsum(sizes) - sizes, row)
    assert sorted(row - sum(piece.length for piece in pieces) for pieces in rows) == sorted(room)


def test_the_index_of_many_documents_is_small() -> None:
    """Catches an object for each piece: corpora have a hundred million documents, and a node eight ranks."""
    lengths = np.random.default_rng(0).lognormal(6.5, 1.2, 50_000).astype(np.int64) + 1
    firsts = np.cumsum(lengths) - lengths
    tracemalloc.start()
    rows = pack(lengths, firsts, 4096)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) > 10_000
    assert held < 20 * len(lengths)


@pytest.mark.parametrize("row", [1024, 4096])
def test_best_fit_wastes_less_than_a_hundredth(row: int) -> None:
    rng = random.Random(0)
    lengths = np.array([int(rng.lognormvariate(6.5, 1.4)) + 1 for _ in range(4000)])
    assert waste(pack(lengths, np.cumsum(lengths) - lengths, row), row) < 0.01


def test_what_a_mix_wastes_goes_by_the_shares_of_its_samples(tmp_path: Path) -> None:
    """Catches: a mean over all rows alike, where a run reads one corpus nine times as often."""
    for name in ("full", "half"):
        (tmp_path / name).mkdir()
    full, half = store_of(tmp_path / "full", [15] * 2), store_of(tmp_path / "half", [8] * 20)
    mixed = Mix((full, half), (Fraction(9, 10), Fraction(1, 10)))
    assert [PackedRows(store, 16).waste for store in mixed.stores] == [0.0, 0.4375]
    assert Feed(mixed, seq_len=16, seed=0, packing=True).waste == pytest.approx(0.04375)
    assert Feed(Mix(mixed.stores), seq_len=16, seed=0, packing=True).waste == pytest.approx(0.4375 * 20 / 22)


def test_a_feed_of_packed_rows_goes_on_where_it_was_and_not_as_another(tmp_path: Path) -> None:
    rng = random.Random(1)
    store = store_of(tmp_path, [rng.randint(1, 20) for _ in range(30)])
    feed = Feed(store, seq_len=16, seed=3, packing=True)
    assert feed.windows == sum(map(len, feed.packed))
    assert feed.waste is not None
    (epoch,) = feed.batch(feed.windows, 0, 1, feed.windows)
    assert int(epoch.loss_mask.sum()) == store.header.tokens - 1
    later = Feed(store, seq_len=16, seed=3, packing=True)
    later.load_state_dict(feed.state_dict())
    assert later.batch(4, 0, 1, 4)[0].tokens.equal(feed.batch(4, 0, 1, 4)[0].tokens)
    with pytest.raises(DataError, match="packing was True, is False"):
        Feed(store, seq_len=16, seed=3).load_state_dict(feed.state_dict())


def test_an_evaluation_predicts_each_token_once(tmp_path: Path) -> None:
    store = store_of(tmp_path, [9, 30, 2, 14, 6])
    options = {"seq_len": 16, "global_batch": 4, "dp_size": 2, "micro_batch": 1, "packed": PackedRows(store, 16)}
    batches = [b for rank in range(2) for found in held_out_batches(store, dp_rank=rank, **options) for b in found]  # type: ignore[arg-type]
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == store.header.tokens - 1
