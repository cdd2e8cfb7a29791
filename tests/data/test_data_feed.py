"""The order law: no layout changes which rows a global batch has, nor their order (P4, P18)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import data, integers, sampled_from

from stretto.batch import Batch
from stretto.data.errors import DataError
from stretto.data.evaluation import held_out_batches
from stretto.data.feed import Feed
from stretto.data.prepare import Splits

pytestmark = pytest.mark.gloo


def global_rows(feeds: list[Feed], global_batch: int, micro: int) -> torch.Tensor:
    """The global batch [B, 3, s] as all dp ranks together hold it, put in order of (microbatch, rank)."""
    ranks = [feed.batch(global_batch, r, len(feeds), micro) for r, feed in enumerate(feeds)]
    return torch.cat([rows(batch) for microbatch in zip(*ranks, strict=True) for batch in microbatch])


def rows(batch: Batch) -> torch.Tensor:
    return torch.stack([batch.tokens, batch.labels, batch.loss_mask.long()], dim=1)


@given(micro=integers(1, 3), dp=integers(1, 5), m=integers(1, 4), s=integers(1, 40), consumed=integers(0, 500))
def test_any_split_holds_the_same_rows_in_the_same_order(
    splits: Splits, micro: int, dp: int, m: int, s: int, consumed: int
) -> None:
    def feed() -> Feed:
        return Feed(splits.train, seq_len=s, seed=3, consumed=consumed)

    size = micro * dp * m
    one = global_rows([feed()], size, 1)
    assert torch.equal(global_rows([feed() for _ in range(dp)], size, micro), one)
    assert torch.equal(global_rows([feed()], size, size), one)


@given(data=data(), before=integers(0, 3), seed=integers(0, 100))
def test_a_resumed_run_is_the_uninterrupted_one_at_any_dp_size(
    splits: Splits, data: Any, before: int, seed: int
) -> None:
    dp, later_dp = data.draw(sampled_from([(1, 2), (2, 3), (3, 6), (6, 1)]))
    size = 6
    whole = [Feed(splits.train, seq_len=16, seed=seed) for _ in range(dp)]
    expected = [global_rows(whole, size, 1) for _ in range(5)]

    first = [Feed(splits.train, seq_len=16, seed=seed) for _ in range(dp)]
    for _ in range(before):
        global_rows(first, size, 1)
    later = [Feed(splits.train, seq_len=16, seed=seed) for _ in range(later_dp)]
    for feed in later:
        feed.load_state_dict(first[0].state_dict())
    for step in range(before, 5):
        assert torch.equal(global_rows(later, size, 1), expected[step])


def test_a_sample_is_a_window_of_the_text(splits: Splits) -> None:
    store = splits.train
    (batch,) = Feed(store, seq_len=8, seed=0).batch(4, 0, 1, 4)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (
        torch.int64,
        torch.int64,
        torch.bool,
    )
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (4, 8)
    assert batch.loss_mask.all()
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    windows = np.lib.stride_tricks.sliding_window_view(store.tokens.astype(np.int64), 9)[::8].tolist()
    assert all(
        [*tokens, labels[-1]] in windows
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
    )


def test_an_epoch_predicts_every_token_but_the_rest_of_a_window_once(splits: Splits) -> None:
    feed = Feed(splits.train, seq_len=7, seed=5)
    (epoch,) = feed.batch(feed.windows, 0, 1, feed.windows)
    expected = splits.train.tokens[1 : 7 * feed.windows + 1].astype(np.int64)
    assert sorted(epoch.labels.flatten().tolist()) == sorted(expected.tolist())
    assert feed.consumed == feed.windows


def test_seeds_give_different_orders(splits: Splits) -> None:
    a, b = (Feed(splits.train, seq_len=4, seed=seed).batch(50, 0, 1, 50)[0].tokens for seed in (1, 2))
    assert not torch.equal(a, b)


def test_a_batch_that_does_not_divide_is_rejected_and_nothing_consumed(splits: Splits) -> None:
    feed = Feed(splits.train, seq_len=4, seed=1)
    with pytest.raises(ValueError, match=r"global_batch=10 is not a multiple of micro_batch\*dp = 2\*3"):
        feed.batch(10, 0, 3, 2)
    assert feed.consumed == 0


def test_too_little_text_says_which_length_fits(splits: Splits) -> None:
    n = splits.train.header.tokens
    with pytest.raises(DataError, match=rf"has {n} tokens.*seq_len \+ 1 = {n + 1}; .*--seq-len {n - 1} at most"):
        Feed(splits.train, seq_len=n, seed=0)
    assert Feed(splits.train, seq_len=n - 1, seed=0).windows == 1


def test_another_stream_is_not_gone_on_with(splits: Splits) -> None:
    state = Feed(splits.train, seq_len=4, seed=1).state_dict()
    with pytest.raises(DataError, match=r"seed was 1, is 2; seq_len was 4, is 5"):
        Feed(splits.held_out, seq_len=5, seed=2).load_state_dict(state)


@given(s=integers(7, 50), micro=integers(1, 3), dp=integers(1, 4), m=integers(1, 3))
def test_held_out_batches_predict_every_token_once_in_any_split(
    splits: Splits, s: int, micro: int, dp: int, m: int
) -> None:
    size = micro * dp * m

    def run(dp: int, micro: int) -> list[list[list[Batch]]]:
        ranks = [
            held_out_batches(splits.held_out, seq_len=s, global_batch=size, dp_rank=r, dp_size=dp, micro_batch=micro)
            for r in range(dp)
        ]
        return [list(step) for step in zip(*ranks, strict=True)]

    def flat(steps: list[list[list[Batch]]]) -> torch.Tensor:
        return torch.cat([rows(b) for step in steps for mb in zip(*step, strict=True) for b in mb])

    split = flat(run(dp, micro))
    assert torch.equal(split, flat(run(1, size)))
    predicted = split[:, 1][split[:, 2].bool()]
    assert sorted(predicted.tolist()) == sorted(splits.held_out.tokens[1:].tolist())


def test_held_out_batches_stop_at_the_limit_and_are_the_same_each_time(splits: Splits) -> None:
    def run(limit: int) -> list[torch.Tensor]:
        batches = held_out_batches(
            splits.held_out, seq_len=4, global_batch=6, dp_rank=0, dp_size=1, micro_batch=2, limit=limit
        )
        return [rows(batch) for step in batches for batch in step]

    assert len(run(2)) == 6
    assert all(torch.equal(a, b) for a, b in zip(run(2), run(5), strict=False))


def test_an_empty_held_out_store_gives_no_batch(text_dir: Any, tmp_path: Any) -> None:
    from stretto.data.corpus import Corpus
    from stretto.data.prepare import prepare
    from stretto.data.tokenizer import ByteTokenizer

    empty = prepare(Corpus.open(text_dir), ByteTokenizer(), held_out=0, cache=tmp_path).held_out
    assert not list(held_out_batches(empty, seq_len=4, global_batch=6, dp_rank=0, dp_size=1, micro_batch=2, limit=3))


def test_a_batch_is_of_one_shape() -> None:
    x = torch.zeros(2, 3, dtype=torch.int64)
    assert Batch(x, x, x.bool()).to("meta").tokens.device.type == "meta"
    with pytest.raises(ValueError, match=r"one shape \[b, s\], got \[\(2, 3\), \(2, 3\), \(2, 2\)\]"):
        Batch(x, x, x[:, :2].bool())
