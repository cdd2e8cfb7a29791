"""What a run trains on, in a few words: for its header, and before there are any tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from stretto.arguments.schema import Arguments
from stretto.data.baselines import COMPARABLE
from stretto.data.corpus import Corpus
from stretto.data.indexed import IndexedTokens
from stretto.data.prepare import Splits
from stretto.data.text import HELD_OUT, Text, foreseen
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


def silent(args: Arguments, text: Text) -> Iterator[str]:
    """Steps in which no token counts: each has no gradient, and a loss that is told as 0."""
    seq_len, batch = args.batch.seq_len, args.batch.global_batch
    if args.data.packing or not any(store.header.masked for store in text.mix.stores):
        return
    windows, found = text.mix.windows(seq_len), [store.uncounted(seq_len) for store in text.mix.stores]
    of_samples = [source.weight or n / sum(windows) for source, n in zip(text.sources, windows, strict=True)]
    share = sum(float(of) * none / n for of, none, n in zip(of_samples, found, windows, strict=True))
    if (steps := args.run.steps * share**batch) >= 1:
        yield (
            f"{sum(found):,} of {sum(windows):,} windows of {seq_len:,} tokens hold none that counts, so in about "
            f"{steps:,.0f} of {args.run.steps:,} steps nothing is learned, and their loss is said to be 0: take a "
            "longer --seq-len or a larger --global-batch"
        )


def lossy(text: Text) -> Iterator[str]:
    """A tokenizer that does not give back the text it was given."""
    if (lost := text.account.lost).bytes:
        no_bits = ", and there are no bits per byte" if text.account.held_out.share > COMPARABLE else ""
        yield f"the tokenizer {text.tokenizer.name} loses {lost}, which the model never sees{no_bits}"


def tokenizer_line(tokenizer: Tokenizer, bytes_per_token: float) -> str:
    """python, 4,096 entries, 3.49 bytes a token."""
    size = f", {bytes_per_token:.2f} bytes a token" if bytes_per_token else ""
    return f"{tokenizer.name}, {tokenizer.vocab_size:,} entries{size}"


def corpus_line(name: str, splits: Splits) -> str:
    """Name, documents, tokens, what was passed over."""
    train, held = splits.train.header, splits.held_out.header
    beside = f", {held.tokens:,} held out" if held.documents else ""
    passed = splits.account.passed
    over = f"; passed over: {passed}" if passed.total else ""
    return f"{name}: {train.documents + held.documents:,} documents, {train.tokens:,} tokens{beside}{over}"


def data_lines(args: Arguments, text: Text) -> Iterator[str]:
    """Each corpus with its share, and how often the run reads it."""
    epochs = text.mix.order(args.batch.seq_len, args.run.seed).epochs(args.run.steps * args.batch.global_batch)
    for source, times in zip(text.sources, epochs, strict=True):
        share = f", {float(source.weight):.4g} of the samples, {times:,.2f} epochs" if source.weight else ""
        yield corpus_line(source.name, source.splits) + share
    names = {HELD_OUT, *(source.name for source in text.sources)}
    for each in text.eval_sets:
        if each.name not in names:
            yield f"validation set {each.name}: {each.store.header.tokens:,} tokens"


def foreseen_lines(args: Arguments, tokenizer: Tokenizer) -> Iterator[str]:
    """The same as far as it is known before anything is tokenized. Raises DataError when a corpus cannot be read."""
    total = size = 0.0
    for name, corpus, splits in foreseen(args, tokenizer):
        if splits is not None:
            yield corpus_line(name, splits)
            tokens, text = float(splits.train.header.tokens), float(splits.train.header.bytes)
        elif isinstance(corpus, IndexedTokens):
            yield f"{name}: tokens of {corpus.size():,} bytes, made elsewhere"
            tokens, text = len_of(corpus) * (1 - args.data.held_out), 0.0
        else:
            files = sum(corpus.stat(file).st_size for file in corpus.files)
            yield f"{name}: {len(corpus.files):,} files of {files:,} bytes, not tokenized yet, so figures are about"
            text = files * (1 - args.data.held_out)
            tokens = text / _bytes_per_token(corpus, tokenizer)
        total, size = total + tokens, size + text
    yield f"tokenizer {tokenizer_line(tokenizer, size / max(total, 1))}"
    yield epochs_line(args, total, args.run.steps)
    for warning in loud(args, tokenizer, total):
        yield f"WARNING: {warning}"


def len_of(tokens: IndexedTokens) -> int:
    """How many there are."""
    return int(tokens.offsets()[1][-1])


def _bytes_per_token(corpus: Corpus, tokenizer: Tokenizer) -> float:
    """Of the first documents."""
    sample = ""
    for document in islice(corpus.documents(), 100):
        sample += document.text[:_SAMPLE]
        if len(sample) >= _SAMPLE:
            break
    ids = len(tokenizer.encode(sample[:_SAMPLE])) if sample else 0
    return len(sample[:_SAMPLE].encode()) / ids if ids else 1.0


def _epochs(args: Arguments, available: float, steps: int) -> float:
    return steps * args.batch.global_batch * args.batch.seq_len / max(available, 1)
