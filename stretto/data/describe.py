"""What a run trains on, in a few words: for its header, and before there are any tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from stretto.arguments.schema import Arguments
from stretto.data.corpus import Corpus
from stretto.data.prepare import Splits, find
from stretto.data.tokenizer import Tokenizer

_SAMPLE: Final = 1 << 16
"""Characters that are tokenized to tell how many bytes a token has."""


def epochs_line(args: Arguments, available: float, steps: int) -> str:
    """How often so many steps read a text of so many tokens: 0.25 epochs of 11,658,264 tokens."""
    return f"{_epochs(args, available, steps):,.2f} epochs of {available:,.0f} tokens"


def loud(args: Arguments, tokenizer: Tokenizer, available: float) -> Iterator[str]:
    """What someone who has not named a text, or not its tokenizer, must not find out after the run."""
    vocab, entries, times = args.model.vocab_size, tokenizer.vocab_size, _epochs(args, available, args.run.steps)
    if args.data.data is None and (vocab != entries or times > 1):
        yield (
            f"no --data is given, so a model with a vocabulary of {vocab:,} trains on the sources of Python's standard "
            f"library: {available:,.0f} tokens of the tokenizer {tokenizer.name} ({entries:,} entries), read "
            f"{times:,.2f} times in {args.run.steps:,} steps. Name your text with --data and its tokenizer with "
            "--tokenizer"
        )
    elif vocab > 2 * entries:
        yield (
            f"a vocabulary of {vocab:,}, of which the tokenizer {tokenizer.name} uses {entries:,}: name the tokenizer "
            "of this model with --tokenizer, or leave --vocab out"
        )


def lossy(splits: Splits, tokenizer: Tokenizer) -> Iterator[str]:
    """A tokenizer that does not give back the text it was given."""
    if splits.account.lost.bytes:
        yield f"the tokenizer {tokenizer.name} loses {splits.account.lost}, which the model never sees" + (
            ", and there are no bits per byte" if splits.account.held_out.share > 0.001 else ""
        )


def tokenizer_line(tokenizer: Tokenizer, bytes_per_token: float) -> str:
    """python, 4,096 entries, 3.49 bytes a token."""
    size = f", {bytes_per_token:.2f} bytes a token" if bytes_per_token else ""
    return f"{tokenizer.name}, {tokenizer.vocab_size:,} entries{size}"


def corpus_line(corpus: Corpus, splits: Splits) -> str:
    """Name, documents, tokens, what was passed over."""
    train, held = splits.train.header, splits.held_out.header
    beside = f", {held.tokens:,} held out" if held.documents else ""
    passed = splits.account.passed
    over = f"; passed over: {passed}" if passed.total else ""
    return f"{corpus.label}: {train.documents + held.documents:,} documents, {train.tokens:,} tokens{beside}{over}"


def foreseen(args: Arguments, tokenizer: Tokenizer) -> tuple[str, float, float]:
    """A corpus in words, its tokens to train on and bytes a token: as they are, or, not tokenized yet, about so many.

    Raises DataError when the corpus cannot be read.
    """
    data = args.data
    corpus = Corpus.open(data.data, data.text_key)
    splits = find(corpus, tokenizer, held_out=data.held_out, cache=data.cache)
    if splits is not None:
        return corpus_line(corpus, splits), splits.train.header.tokens, splits.train.bytes_per_token
    size, sample = sum(corpus.stat(file).st_size for file in corpus.files), ""
    for document in islice(corpus.documents(), 100):
        sample += document.text[:_SAMPLE]
        if len(sample) >= _SAMPLE:
            break
    ids = len(tokenizer.encode(sample[:_SAMPLE])) if sample else 0
    bytes_per_token = len(sample[:_SAMPLE].encode()) / ids if ids else 1.0
    words = f"{corpus.label}: {len(corpus.files):,} files of {size:,} bytes, not tokenized yet, so figures are about"
    return words, size * (1 - data.held_out) / bytes_per_token, bytes_per_token


def _epochs(args: Arguments, available: float, steps: int) -> float:
    return steps * args.batch.global_batch * args.batch.seq_len / max(available, 1)
