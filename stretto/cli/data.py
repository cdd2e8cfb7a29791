"""`stretto data`: turn the text of a run into tokens beforehand, and say what is in it.

It takes the words of `stretto train`, so that the same presets, files and flags name the same text.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from stretto.arguments import ConfigError, DataConfig
from stretto.arguments.help import help_text
from stretto.cli.words import FALLBACK, parse_or_demo
from stretto.console import console
from stretto.data.baselines import baselines
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.prepare import Splits, prepare
from stretto.data.tokenizer import load_tokenizer
from stretto.terminal import say

USAGE_ERROR = 2

VERBS: Final = {
    "build": "tokenize a corpus into the cache, so that all ranks of a run find it there",
    "inspect": "the same; then check every token, and measure what a model must beat",
}

USAGE: Final = f"""\
usage: stretto data build [options]      {VERBS["build"]}
       stretto data inspect [options]    {VERBS["inspect"]}

The options are those of `stretto train`; --data, --tokenizer, --held-out and --cache matter."""

HELP: Final = """\
stretto data {verb}: {what}

The words of a run may stand here as they are: the other settings of `stretto train`, which its --help lists, are
understood and have no effect.

"""


def main(argv: Sequence[str]) -> int:
    """Run `stretto data ...`; 0, or 2 when the configuration, the corpus or the cache cannot be used."""
    verb, *rest = argv or ("",)
    if verb not in VERBS:
        asked = verb in ("-h", "--help")
        say(USAGE, out=asked)
        return 0 if asked else USAGE_ERROR
    if {"-h", "--help"} & set(rest):
        say(HELP.format(verb=verb, what=VERBS[verb]), out=True, end="")
        width = shutil.get_terminal_size((100, 24)).columns
        say(help_text(f"stretto data {verb}", width, fallback=FALLBACK, only=("data",)), out=True, end="")
        return 0
    try:
        config = parse_or_demo(rest).args.data
        _run(config, console(soft_wrap=True), inspect=verb == "inspect")
    except (ConfigError, DataError) as error:
        say(f"stretto data: {error}")
        return USAGE_ERROR
    return 0


def _run(config: DataConfig, screen: Console, *, inspect: bool) -> None:
    begin = time.perf_counter()
    corpus = Corpus.open(config.data)
    splits = prepare(corpus, load_tokenizer(config.tokenizer), held_out=config.held_out, cache=config.cache)
    screen.print(f"{corpus.root}: {len(corpus.files)} files, ready in {time.perf_counter() - begin:.1f} s")
    screen.print(_table(splits))
    screen.print(f"cache: {splits.train.path.parent}")
    if inspect:
        _check(splits)
        if config.held_out > 0:
            measured = baselines(corpus, config.held_out)
            screen.print(f"held out, bits per byte: bigram {measured.bigram:.3f}, zlib {measured.zlib:.3f}")


def _table(splits: Splits) -> Table:
    table = Table("split", "documents", "bytes", "tokens", "bytes/token", "digest")
    for column in table.columns[1:5]:
        column.justify = "right"
    for name, store in (("train", splits.train), ("held out", splits.held_out)):
        head = store.header
        sizes = (f"{head.documents:,}", f"{head.bytes:,}", f"{head.tokens:,}", f"{store.bytes_per_token:.2f}")
        table.add_row(name, *sizes, head.digest[:12])
    return table


def _check(splits: Splits) -> None:
    """Raise DataError when a store no longer holds the tokens that were written."""
    for store in (splits.train, splits.held_out):
        if not store.intact():
            raise DataError(f"{store.path} is damaged: its tokens do not have the digest of its header; delete it")
