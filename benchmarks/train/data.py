"""The tokens that all peers read: random, in a token store of Stretto's, handed out by its feed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.train.shapes import Job, Shape
from stretto.batch import Batch
from stretto.data.feed import Feed
from stretto.data.store import TokenStore, write_store

SEQUENCES = 256


def write_tokens(path: Path, shape: Shape, *, seed: int = 0) -> None:
    """A store of uniformly random tokens, enough for some steps before they repeat."""
    draw = np.random.default_rng(seed)
    with write_store(path, vocab_size=shape.vocab, eod=0, fingerprint="random") as writer:
        for _ in range(SEQUENCES):
            writer.add(draw.integers(0, shape.vocab, shape.seq_len - 1), shape.seq_len)


class Rows:
    """The microbatches of a data-parallel rank, step after step; all peers see the same ones."""

    def __init__(self, job: Job, dp_rank: int) -> None:
        self.job, self.rank = job, dp_rank
        self.feed = Feed(TokenStore.open(Path(job.tokens)), seq_len=job.shape.seq_len, seed=job.seed)

    def next(self) -> list[Batch]:
        """This rank's microbatches of the next step, on the host."""
        shape = self.job.shape
        return self.feed.batch(shape.global_batch, self.rank, self.job.size("dp"), shape.micro_batch)
