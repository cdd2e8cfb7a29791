"""Which part of the keys of the other ranks does a rank of cp need, as packed rows are dealt? Counted, nothing runs.

    python -m benchmarks.needed_keys [--rows 5] [--window N]

An all-gather brings all of them, in company with gradients of as many on the way back; `--cp-comm needed` brings those
that are counted here. Lengths of documents are log-normal: of a mean in parts of the row, and with a sigma.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from math import log

import numpy as np
from rich.console import Console
from rich.table import Table

from stretto.sequence import Run, deal, runs_of, tiles, work
from stretto.sequence.deal import uneven

KINDS = {"16, sigma 1": (16, 1.0), "64, sigma 1.5": (64, 1.5), "64, sigma 2": (64, 2.0), "one document": (0, 0.0)}


def lengths_of(row: int, parts: int, sigma: float, rng: random.Random) -> list[int]:
    """Documents that fill a row, the last of them cut."""
    found: list[int] = []
    while (left := row - sum(found)) > 0:
        drawn = round(rng.lognormvariate(log(row / parts) - sigma**2 / 2, sigma)) if parts else row
        found.append(max(1, min(drawn, left)))
    return found


def needed(held: Sequence[Sequence[Run]], window: int | None = None) -> list[float]:
    """Of each rank the part of the others' tokens whose keys some query of its own sees."""
    found = []
    for rank, queries in enumerate(held):
        seen, all_of = 0, 0
        for other, keys in enumerate(held):
            if other != rank:
                end = 0
                for begin, stop in sorted((t.key.start, t.key.stop) for t in tiles(queries, keys, window)):
                    seen += max(0, stop - max(begin, end))
                    end = max(end, stop)
                all_of += sum(run.length for run in keys)
        found.append(seen / all_of)
    return found


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--window", type=int)
    said = parser.parse_args(words)
    rng = random.Random(0)
    table = Table("row", "mean of 1/n, n =", "cp", "needed, mean", "by one rank", "load max/mean", box=None)
    for row in (32_768, 131_072):
        for kind, (parts, sigma) in KINDS.items():
            for cp in (2, 4, 8):
                shares, loads_of = [], []
                for _ in range(said.rows if parts else 1):
                    lengths, loads = lengths_of(row, parts, sigma, rng), np.zeros(cp, np.int64)
                    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
                    dealt = deal(work(starts, (said.window,)), cp, row // cp, loads)
                    shares.append(needed([runs_of(own, starts) for own in dealt], said.window))
                    loads_of.append(uneven(loads))
                told = (np.mean(shares), np.mean([max(each) for each in shares]))
                table.add_row(f"{row:,}", kind, str(cp), *(f"{x:.0%}" for x in told), f"{max(loads_of):.3f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
