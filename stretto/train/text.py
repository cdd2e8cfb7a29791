"""Text as batches: those that `stretto train` trains and evaluates on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stretto.arguments.schema import BatchConfig
from stretto.batch import Batch
from stretto.collectives import all_reduce
from stretto.data.baselines import bits_per_byte
from stretto.data.evaluation import held_out_batches
from stretto.data.feed import Feed
from stretto.data.packed import PackedRows
from stretto.data.text import EvalSet
from stretto.models import Microbatch
from stretto.parallel_state import ParallelState
from stretto.structure import SequenceCut


@dataclass
class TextBatches:
    """The `Batches` of a feed."""

    feed: Feed
    batch: BatchConfig
    state: ParallelState
    cut: SequenceCut = field(default_factory=SequenceCut)

    @property
    def tokens(self) -> int:
        return self.feed.consumed * self.batch.seq_len

    @property
    def epoch(self) -> float:
        return self.feed.consumed / self.feed.windows

    def next(self) -> list[Batch]:
        dp, batch = self.state.axis("dp"), self.batch
        return self.feed.batch(batch.global_batch, dp.rank, dp.size, batch.micro_batch)

    def ready(self, microbatches: Sequence[Batch]) -> list[Microbatch]:
        return counted(microbatches, self.state, self.cut)

    def state_dict(self) -> dict[str, Any]:
        return self.feed.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.feed.load_state_dict(state)


@dataclass(frozen=True)
class HeldOut:
    """A validation set: `limit` global batches of it at most, 0: all, every token weighing the same."""

    text: EvalSet
    batch: BatchConfig
    state: ParallelState
    limit: int
    cut: SequenceCut = field(default_factory=SequenceCut)
    packing: bool = False

    @cached_property
    def _packed(self) -> PackedRows | None:
        return PackedRows(self.text.store, self.batch.seq_len) if self.packing else None

    def batches(self) -> Iterator[tuple[list[Microbatch], Tensor]]:
        for rows in held_out_batches(
            self.text.store,
            seq_len=self.batch.seq_len,
            global_batch=self.batch.global_batch,
            dp_rank=self.state.axis("dp").rank,
            dp_size=self.state.axis("dp").size,
            micro_batch=self.batch.micro_batch,
            limit=self.limit or None,
            packed=self._packed,
        ):
            microbatches, count = _weighed(rows, self.state, self.cut)
            yield microbatches, count

    def bits_per_byte(self, loss: float) -> float | None:
        return bits_per_byte(loss, self.text.store.bytes_per_token, self.text.lost)


def counted(rows: Sequence[Batch], state: ParallelState, cut: SequenceCut) -> list[Microbatch]:
    """This rank's part of whole rows on the device, with the number of valid tokens in the whole global batch."""
    return _weighed(rows, state, cut)[0]


def _weighed(rows: Sequence[Batch], state: ParallelState, cut: SequenceCut) -> tuple[list[Microbatch], Tensor]:
    """The same, and that number [] as it is: what the loss of the batch weighs, 0 where nothing counts."""
    device = state.world.device
    here = [(batch.to(device), structure.to(device)) for batch, structure in map(cut.of, rows)]
    count = valid_tokens([batch for batch, _ in here], state)
    divisor = count.clamp(min=1)  # a batch in which nothing counts has a loss of 0
    return [Microbatch(batch, divisor, structure) for batch, structure in here], count


def valid_tokens(batches: Sequence[Batch], state: ParallelState) -> Tensor:
    """[]: tokens of the global batch that count, in fp64 (exact to 2^53)."""
    own = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().double()
    return all_reduce(own, state.axis("dp", "cp"))
