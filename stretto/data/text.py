"""What a run reads: its corpora, one tokenizer, token stores to train on and to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

from stretto.arguments.corpora import Share, named, shares
from stretto.arguments.schema import Arguments, DataConfig
from stretto.data.account import Account
from stretto.data.baselines import Baselines
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.indexed import IndexedTokens, prepare_indexed
from stretto.data.lock import Tell
from stretto.data.lost import Lost
from stretto.data.mixture import Mix
from stretto.data.prepare import Splits, find, prepare
from stretto.data.store import TokenStore
from stretto.data.tokenizer import Tokenizer, load_tokenizer

HELD_OUT: Final = "held_out"
"""The name of the validation set of a single corpus."""


@dataclass(frozen=True)
class Source:
    """One corpus, by a name of its own among those of the run, and its share of the samples."""

    name: str
    corpus: Corpus | IndexedTokens
    splits: Splits
    weight: Fraction | None


@dataclass(frozen=True)
class EvalSet:
    """Text to evaluate on, the bytes of it that the tokenizer loses, and what a model must beat where that is known."""

    name: str
    store: TokenStore
    lost: Lost
    baselines: Baselines | None


@dataclass(frozen=True)
class Text:
    """What a run reads: corpora, tokenizer, validation sets."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    eval_sets: tuple[EvalSet, ...]

    @classmethod
    def open(cls, args: Arguments, tell: Tell | None = None, workers: int = 1) -> Text:
        """From the cache, or built there; `tell` hears how far that is, whoever does it.

        Raises DataError when the data cannot be used.
        """
        data, tokenizer = args.data, load_tokenizer(args.data.tokenizer)
        tell = tell or (lambda _: None)
        found = []
        for name, share in _shares(data):
            corpus = open_corpus(share, data)
            splits = _prepare(corpus, tokenizer, data, data.held_out, tell, workers)
            found.append(Source(name or corpus.label, corpus, splits, share.weight if share else None))
        return cls(tuple(found), tokenizer, tuple(_eval_sets(found, tokenizer, data, tell, workers)))

    @property
    def mix(self) -> Mix:
        """The stores to train on, and their shares."""
        weights = tuple(source.weight for source in self.sources if source.weight is not None)
        return Mix(tuple(source.splits.train for source in self.sources), weights or None)

    @property
    def account(self) -> Account:
        """Of all corpora together."""
        return sum((source.splits.account for source in self.sources), Account())


def foreseen(args: Arguments, tokenizer: Tokenizer) -> Iterator[tuple[str, Corpus | IndexedTokens, Splits | None]]:
    """Each corpus of a run and what is built of it, if it is. Raises DataError where it cannot be read."""
    data = args.data
    for name, share in _shares(data):
        corpus = open_corpus(share, data)
        splits = None
        if isinstance(corpus, Corpus):
            splits = find(corpus, tokenizer, held_out=data.held_out, cache=data.cache)
        weight = f" ({float(share.weight):.4g} of the samples)" if share and share.weight else ""
        yield f"{name or corpus.label}{weight}", corpus, splits


def open_corpus(share: Share | None, data: DataConfig) -> Corpus | IndexedTokens:
    """Files of text, or tokens that are made. Raises DataError."""
    if share is None:
        return Corpus.open(None)
    if (tokens := IndexedTokens.at(share.path)) is not None:
        return tokens
    return Corpus.open(share.path, data.text_key)


def _shares(data: DataConfig) -> list[tuple[str | None, Share | None]]:
    """Each corpus, and its name where there are several."""
    if data.data is None:
        return [(None, None)]
    try:
        found = shares(data.data)
    except ValueError as error:
        raise DataError(f"data.data={data.data!r}: {error}") from None
    if len(found) == 1:
        return [(None, found[0])]
    names: list[str] = []
    for share in found:
        name = Path(share.path).name.split(".")[0] or "corpus"
        names.append(name if name not in (*names, HELD_OUT, "train") else f"{name}-{len(names) + 1}")
    return list(zip(names, found, strict=True))


def _prepare(
    corpus: Corpus | IndexedTokens, tokenizer: Tokenizer, data: DataConfig, held_out: float, tell: Tell, workers: int
) -> Splits:
    if isinstance(corpus, IndexedTokens):
        return prepare_indexed(corpus, tokenizer, held_out=held_out, cache=data.cache, tell=tell)
    return prepare(
        corpus, tokenizer, held_out=held_out, cache=data.cache, most_lost=data.max_lost, workers=workers, tell=tell
    )


def _eval_sets(
    sources: list[Source], tokenizer: Tokenizer, data: DataConfig, tell: Tell, workers: int
) -> Iterator[EvalSet]:
    """The held-out documents of each corpus, then the validation sets that have names."""
    for source in sources:
        account = source.splits.account
        if source.splits.held_out.header.documents:
            name = HELD_OUT if len(sources) == 1 else source.name
            yield EvalSet(name, source.splits.held_out, account.held_out, account.baselines)
    try:
        sets = named(data.eval_data)
    except ValueError as error:
        raise DataError(f"data.eval_data: {error}") from None
    for name, path in sets:
        if len(sources) > 1 and name in [source.name for source in sources]:
            raise DataError(f"data.eval_data: {name} is the name of a corpus of --data; choose another")
        corpus = open_corpus(Share(path, None), data)
        splits = _prepare(corpus, tokenizer, data, 0.0, tell, workers)
        yield EvalSet(name, splits.train, splits.account.train, None)
