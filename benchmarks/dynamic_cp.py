"""What would it be worth to choose the size of cp for each document? A simulation on lengths as they are.

    python -m benchmarks.dynamic_cp [--data DIR] [--tokenizer byte] [--group 8] [--capacity 8192]

Documents of a corpus go through a group of ranks: all on all of them, or each on as few as hold it
(`stretto.sequence.dynamic`). Times are those of a layer of Llama 3 8B by the assumptions of `stretto.estimate.context`;
GEMMs at 600 TFLOP/s. Nothing is measured, and nothing runs this way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from stretto.data.corpus import Corpus
from stretto.data.prepare import prepare
from stretto.data.tokenizer import load_tokenizer
from stretto.estimate.context import ATTENTION, LATENCY, NODE
from stretto.sequence.dynamic import Rates, fixed, makespan, plan

HIDDEN, HEADS, KV_HEADS, DIM, FFN = 4096, 32, 8, 128, 14336
PRODUCTS = 600e12

LAYER = HIDDEN * DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * FFN
RATES = Rates(
    token=6 * LAYER / PRODUCTS,
    pair=3.5 * 4 * HEADS * DIM / ATTENTION,
    exchange=2 * KV_HEADS * DIM * (2 * 2 + 4) / NODE,
    latency=3 * LATENCY,
)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data")
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--capacity", type=int, default=8192, help="tokens that a rank holds")
    parser.add_argument("--step", type=int, default=400, help="documents of a step")
    said = parser.parse_args(words)
    splits = prepare(Corpus.open(said.data), load_tokenizer(said.tokenizer), held_out=0.05, cache="~/.cache/stretto")
    every = np.minimum(np.diff(splits.train.offsets), said.group * said.capacity)
    table = Table("documents", "longest", "all on all, ms", "each on few, ms", "times", box=None)
    totals = [0.0, 0.0]
    for first in range(0, len(every), said.step):
        lengths = [int(n) for n in every[first : first + said.step] if n]
        found = (
            fixed(lengths, said.group, RATES),
            makespan(lengths, plan(lengths, said.group, said.capacity, RATES), RATES),
        )
        totals = [a + b for a, b in zip(totals, found, strict=True)]
        table.add_row(
            str(len(lengths)), f"{max(lengths):,}", *(f"{1e3 * t:.2f}" for t in found), f"{found[0] / found[1]:.2f}"
        )
    table.add_row("all", "", *(f"{1e3 * t:.2f}" for t in totals), f"{totals[0] / totals[1]:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
