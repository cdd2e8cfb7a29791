"""What a batch of text costs the host, from a store that is larger than caches: wall clock, against a step.

    python -m benchmarks.data_wait [--gigabytes 1] [--shape D1] [--step-ms 275.8] [--out FILE]

The store has random tokens in documents of random lengths: what is in them costs nothing. Samples are taken in the
order of a run, so they come from all over the file. The loop of a run waits for this in front of each step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.train.shapes import SHAPES
from stretto.data.feed import Feed
from stretto.data.store import TokenStore, write_store

VOCAB = 50_000
"""Two bytes a token."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_wait", description="ms of the host for a batch")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="D1")
    parser.add_argument("--step-ms", type=float, default=275.8, help="of a step of this shape on a GPU")
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    shape, rng = SHAPES[asked.shape], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with write_store(Path(folder) / "tokens", vocab_size=VOCAB, eod=0, fingerprint="") as writer:
            left = int(asked.gigabytes * 1e9 / 2)
            while left > 0:
                ids = rng.integers(1, VOCAB, int(rng.integers(1 << 16, 1 << 20)), dtype=np.int64)
                writer.add(ids, 4 * len(ids))
                left -= len(ids)
        feed, took = Feed(TokenStore.open(Path(folder) / "tokens"), seq_len=shape.seq_len, seed=0), list[float]()
        for _ in range(asked.batches):
            begin = time.perf_counter()
            feed.batch(shape.global_batch, 0, 1, shape.micro_batch)
            took.append(1e3 * (time.perf_counter() - begin))
    took.sort()
    found = {
        "command": " ".join(["python -m benchmarks.data_wait", *sys.argv[1:]]),
        "rows": [shape.global_batch, shape.seq_len],
        "gigabytes": asked.gigabytes,
        "mean_ms": statistics.mean(took),
        "median_ms": statistics.median(took),
        "p99_ms": took[int(0.99 * len(took))],
        "share_of_step": statistics.mean(took) / asked.step_ms,
        "step_ms": asked.step_ms,
    }
    print(json.dumps(found, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
