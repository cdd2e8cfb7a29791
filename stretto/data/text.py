"""What a run reads: its corpora, one tokenizer, token stores to train on and to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from stretto.arguments.schema import Arguments, DataConfig
from stretto.data.account import Account
from stretto.data.baselines import Baselines
from stretto.data.chat import ChatTokenizer
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.formats import RECORD
from stretto.data.indexed import IndexedTokens, prepare_indexed
from stretto.data.lock import Tell
from stretto.data.lost import Lost
from stretto.data.mixture import Mix
from stretto.data.prepare import Splits, find, prepare
from stretto.data.store import TokenStore
from stretto.data.tokenizer import Tokenizer, load_tokenizer
from stretto.notation.corpora import Share, named, shares

Known = Mapping[str, Any] | None
"""What one process tells another of a corpus, as JSON has it; None for one that each opens by itself."""

HELD_OUT: Final = "held_out"
"""The name of the validation set of a single corpus."""


@dataclass(frozen=True)
class Source:
    """One corpus, by a name of its own among those of the run, and its share of the samples."""

    name: str
    corpus: Corpus | IndexedTokens | None
    """None on a rank that was told of the splits."""
    splits: Splits
    weight: Fraction | None
    path: str = ""
    """From the root on; empty for the standard library."""


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
    known: tuple[Known, ...] = ()
    """Of each corpus in turn, for another process: `open(args, known=...)` then looks at no file of text."""

    @classmethod
    def open(
        cls, args: Arguments, tell: Tell | None = None, workers: int = 1, *, known: Sequence[Known] | None = None
    ) -> Text:
        """From the cache, or built there; `tell` hears how far that is, whoever does it.

        Raises DataError when the data cannot be used, or when what is `known` is not here.
        """
        data, tokenizer = args.data, load_tokenizer(args.data.tokenizer)
        opening = _Opening(reads_of(data, tokenizer), data, tell or (lambda _: None), workers, known)
        found = []
        for name, share in _shares(data):
            label, corpus, splits = opening.splits(share, data.held_out)
            path = str(Path(share.path).expanduser().absolute()) if share else ""
            found.append(Source(name or label, corpus, splits, share.weight if share else None, path))
        eval_sets = tuple(_eval_sets(found, data, opening))
        return cls(tuple(found), tokenizer, eval_sets, tuple(opening.said))

    @property
    def mix(self) -> Mix:
        """The stores to train on, and their shares."""
        weights = tuple(source.weight for source in self.sources if source.weight is not None)
        stores, paths = zip(*((source.splits.train, source.path) for source in self.sources), strict=True)
        return Mix(stores, weights or None, paths, self.tokenizer.fingerprint)

    @property
    def account(self) -> Account:
        """Of all corpora together."""
        return sum((source.splits.account for source in self.sources), Account())


def foreseen(args: Arguments, tokenizer: Tokenizer) -> Iterator[tuple[str, Corpus | IndexedTokens, Splits | None]]:
    """Each corpus of a run and what is built of it, if it is. Raises DataError where it cannot be read."""
    data, tokenizer = args.data, reads_of(args.data, tokenizer)
    for name, share in _shares(data):
        corpus = open_corpus(share, data)
        splits = None
        if isinstance(corpus, Corpus):
            splits = find(corpus, tokenizer, held_out=data.held_out, cache=data.cache)
        weight = f" ({float(share.weight):.4g} of the samples)" if share and share.weight else ""
        yield f"{name or corpus.label}{weight}", corpus, splits


def reads_of(data: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
    """What makes tokens of a run's documents: the tokenizer, or it with the template of conversations."""
    return ChatTokenizer.of(tokenizer) if data.format == "chat" else tokenizer


def open_corpus(share: Share | None, data: DataConfig) -> Corpus | IndexedTokens:
    """Files of text, or tokens that are made. Raises DataError."""
    chat = data.format == "chat"
    if share is None:
        if chat:
            raise DataError("--format chat needs --data: the sources of the standard library are no conversations")
        return Corpus.open(None)
    if not chat and (tokens := IndexedTokens.at(share.path)) is not None:
        return tokens
    return Corpus.open(share.path, RECORD if chat else data.text_key)


def _shares(data: DataConfig) -> list[tuple[str | None, Share | None]]:
    """Each corpus, and its name where there are several."""
    if data.data is None:
        return [(None, None)]
    try:
        found = shares(data.data)
    except ValueError as error:
        raise DataError(f"--data {data.data!r}: {error}") from None
    if len(found) == 1:
        return [(None, found[0])]
    names: list[str] = []
    for share in found:
        name = Path(share.path).name.split(".")[0] or "corpus"
        names.append(name if name not in (*names, HELD_OUT, "train") else f"{name}-{len(names) + 1}")
    return list(zip(names, found, strict=True))


class _Opening:
    """Corpora, one after the other: looked at here, or known from a process that has looked."""

    def __init__(
        self, tokenizer: Tokenizer, data: DataConfig, tell: Tell, workers: int, known: Sequence[Known] | None
    ) -> None:
        self.tokenizer, self.data, self.tell, self.workers = tokenizer, data, tell, workers
        self.known = None if known is None else list(known)  # in turn
        self.said: list[Known] = []

    def splits(self, share: Share | None, held_out: float) -> tuple[str, Corpus | IndexedTokens | None, Splits]:
        """The label of the next corpus, it, and what is built of it. Raises DataError."""
        if self.known is not None:
            if not self.known:
                raise DataError("fewer corpora are known than the run reads")
            if (known := self.known.pop(0)) is not None:
                return str(known.get("label")), None, Splits.from_json(known)
        corpus = open_corpus(share, self.data)
        if isinstance(corpus, IndexedTokens):  # nothing was built, and two files are all that there is to look at
            splits = prepare_indexed(corpus, self.tokenizer, held_out=held_out, cache=self.data.cache, tell=self.tell)
            self.said.append(None)
            return corpus.label, corpus, splits
        splits = prepare(
            corpus,
            self.tokenizer,
            held_out=held_out,
            cache=self.data.cache,
            most_lost=self.data.max_lost,
            workers=self.workers,
            tell=self.tell,
        )
        self.said.append({"label": corpus.label, **splits.as_json()})
        return corpus.label, corpus, splits


def _eval_sets(sources: list[Source], data: DataConfig, opening: _Opening) -> Iterator[EvalSet]:
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
        _, _, splits = opening.splits(Share(path, None), 0.0)
        yield EvalSet(name, splits.train, splits.account.train, None)
