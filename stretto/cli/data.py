"""`stretto data`: turn the text of a run into tokens beforehand, and say what is in it.

It takes the words of `stretto train`, so that the same presets, files and flags name the same text.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.table import Table

from stretto.arguments import Arguments, ConfigError
from stretto.arguments.setting import setting
from stretto.cli.command import USAGE_ERROR, chosen
from stretto.cli.words import newest_record, of_run, parse_or_demo
from stretto.console import console
from stretto.data.corpus import Corpus
from stretto.data.describe import lossy
from stretto.data.errors import DataError
from stretto.data.indexed import IndexedTokens
from stretto.data.text import Source, Text
from stretto.report.batch import first_batch
from stretto.report.tokenizing import Tokenizing
from stretto.terminal import say

MOST_WORKERS: Final = 1024


@dataclass(frozen=True)
class Build:
    """Tokenize a corpus into the cache, so that all ranks of a run find it there.

    The words of a run may stand here as they are: the other settings of `stretto train`, which its --help lists, are
    understood and have no effect. On several nodes that share the cache, run the same command on each: they share the
    work.
    """

    workers: int | None = setting(
        None,
        "so many processes tokenize, each on one core; unset: as many as there are cores",
        at_least=1,
        at_most=MOST_WORKERS,
    )


@dataclass(frozen=True)
class Inspect(Build):
    """Build, check every token, say what a model must beat, show the first batch.

    Of the settings of `stretto train` those of [data] matter, and for the batch --seq-len, --global-batch and --seed.
    """


FORMS: Final = (of_run("data build", Build, ("data",)), of_run("data inspect", Inspect, ("data",)))


def main(argv: Sequence[str]) -> int:
    """Run `stretto data ...`; 0, or 2 when the configuration, the corpus or the cache cannot be used."""
    form, rest = chosen(FORMS, argv)
    try:
        resolved = parse_or_demo(rest, form=form, checkpoint=newest_record)
        workers = resolved.own.workers or len(os.sched_getaffinity(0))
        _run(resolved.args, console(soft_wrap=True), workers, inspect=form.own is Inspect)
    except (ConfigError, DataError) as error:
        say(f"stretto data: {error}")
        return USAGE_ERROR
    return 0


def _run(args: Arguments, screen: Console, workers: int, *, inspect: bool) -> None:
    begin = time.perf_counter()
    with Tokenizing.shown(sys.stderr) as tell:
        text = Text.open(args, tell, workers)
    took = time.perf_counter() - begin
    for source in text.sources:
        screen.print(f"{_files(source)}; ready in {took:.1f} s")
    screen.print(_table(text))
    for source in text.sources:
        if isinstance(source.corpus, Corpus):
            screen.print(f"cache: {source.splits.train.path.parent}")
    for warning in lossy(text):
        screen.print(f"warning: {warning}")
    if not inspect:
        return
    for store in (*text.mix.stores, *(each.store for each in text.eval_sets)):
        if not store.intact():
            raise DataError(f"{store.path} is damaged: its tokens do not have the digest of its header; delete it")
    for each in text.eval_sets:
        if (beat := each.baselines) is not None:
            name = each.name.replace("held_out", "held out")
            screen.print(f"{name}, bits per byte: bigram {beat.bigram:.3f}, zlib {beat.zlib:.3f}")
    screen.print(first_batch(args, text))


def _files(source: Source) -> str:
    """What was read, and what was passed over."""
    corpus, passed = source.corpus, source.splits.account.passed
    if isinstance(corpus, IndexedTokens):
        return f"{corpus.tokens}: tokens that are made"
    assert corpus is not None  # this process has looked
    beside = f", and {passed.total:,} passed over: {passed}" if passed.total else ""
    files = len(corpus.files) + corpus.passed.total - passed.total
    return f"{corpus.place}: {files:,} file{'s' * (files != 1)}{beside}"


def _table(text: Text) -> Table:
    table = Table("split", "documents", "bytes", "tokens", "bytes/token", "digest")
    for column in table.columns[1:5]:
        column.justify = "right"
    several = len(text.sources) > 1
    rows = [(source.name if several else "train", source.splits.train) for source in text.sources]
    rows += [(f"{source.name}, held out" if several else "held out", source.splits.held_out) for source in text.sources]
    known = {id(store) for _, store in rows}
    rows += [(each.name, each.store) for each in text.eval_sets if id(each.store) not in known]
    for name, store in rows:
        head = store.header
        size, each = (f"{head.bytes:,}", f"{store.bytes_per_token:.2f}") if head.bytes else ("-", "-")
        sizes = (f"{head.documents:,}", size, f"{head.tokens:,}", each)
        table.add_row(name, *sizes, head.digest[:12])
    return table
