"""Buckets of sharded weights that GEMMs read in FP8: gathered in a byte for each element.

After an update each rank looks for the largest number in its part of each matrix, the ranks agree on the largest of
these, for all buckets of a stage at once, and each quantizes its own range by the scales that follow. From then on
visits gather bytes, to where the GEMMs read them. Their transposed copies are made for a backward, and live as long as
what they are made of. Weights in their own dtype are gathered for those alone who ask for them (`make_whole`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stretto.collectives import all_gather_into
from stretto.distributed.bucket import Bucket
from stretto.distributed.memory import allocate, free, here, zeros
from stretto.params import Declared
from stretto.schedule import Sharding
from stretto.world import Axis, Work

ALIGNED = 32
"""Numbers of fp32 from one scale to the next, 128 bytes."""


class Quantizer(Protocol):
    """How GEMMs want their weights: in `dtype`, of a byte, with one scale for each matrix."""

    dtype: torch.dtype

    def takes(self, weight: nn.Parameter) -> bool:
        """Whether nothing but such GEMMs reads it."""

    def scales(self, parts: Sequence[Tensor], over: Axis) -> Tensor:
        """[n] in fp32: of each matrix, of which this rank has a part [k], and the ranks of an axis have the rest."""

    def quantize_(self, out: Tensor, x: Tensor, scale: Tensor) -> object:
        """x [k] in units of its scale [1] into `out`."""

    def transpose_(self, out: Tensor, x: Tensor) -> object:
        """x [n, d] into `out` [d, n]."""

    def give(self, weights: Mapping[nn.Parameter, Any]) -> object:
        """GEMMs are to read these `Matrix`."""


class Matrix:
    """A weight in FP8 [d_out, d_in] with its scale [1, 1], and the copy across: views of memory that comes and goes."""

    def __init__(self, bucket: QuantizedBucket, param: nn.Parameter, scale: Tensor) -> None:
        dtype = bucket.quantizer.dtype
        self.bucket, self.bytes = bucket, bucket.view(bucket.bytes, param)
        self.bytes_across = bucket.view(bucket.transposed, param).view(*reversed(param.shape))
        self.plain, self._across = self.bytes.view(dtype), self.bytes_across.view(dtype)
        self.plain_scale = self.across_scale = scale.view(1, 1)

    @property
    def across(self) -> Tensor:
        """[d_in, d_out], which is made for a backward."""
        self.bucket.transpose(self)
        return self._across


class QuantizedBucket(Bucket):
    """A bucket of matrices that are sharded; over one rank there is none."""

    shares = False
    independent = False

    def __init__(
        self, items: Sequence[Declared], axis: Axis, sharding: Sharding, quantizer: Quantizer, **options: Any
    ) -> None:
        super().__init__(items, axis, sharding, **options)
        first = items[0].param
        self.quantizer = quantizer
        self.bytes = zeros(self.flat.numel, first, torch.uint8, None)
        """[numel] of all matrices, between `gather` and `release`."""
        self.transposed = zeros(self.flat.numel, first, torch.uint8, None)
        """The same across."""
        self.own_bytes = zeros(len(self.own), first, torch.uint8, self._gather.peer_memory)
        """This rank's, after the first `gather`."""
        # cuBLAS reads a scale where an allocation begins, not between two of them: FP8 GEMMs reject other addresses.
        self.scales = torch.ones(len(items), ALIGNED, dtype=torch.float32, device=first.device)[:, 0]
        scales = dict(zip(self.params, torch.split(self.scales, 1), strict=True))
        self.matrices = {param: Matrix(self, param, scale) for param, scale in scales.items()}
        self.parts = [self.part(self.shard, param).flat for param in self.params]
        """What this rank has of each matrix, [k]."""
        own = [self.part(self.own_bytes, param).flat.view(quantizer.dtype) for param in self.params]
        self._quantized = [each for each in zip(own, self.parts, scales.values(), strict=True) if len(each[0])]
        free(self.bytes)
        free(self.transposed)
        self.stale = True
        """Whether the shard has changed since it was quantized."""
        self.together: Sequence[QuantizedBucket] = (self,)
        """Those whose scales are agreed on at once."""
        self._made: set[Matrix] = set()  # across

    @property
    def asked(self) -> bool:
        return here(self.bytes)

    def _begin(self) -> Work:
        if self.stale:
            quantize([bucket for bucket in self.together if bucket.stale])
        allocate(self.bytes)
        return all_gather_into(self.bytes, self.own_bytes, self._gather)

    def make_whole(self) -> None:
        if not self.whole:
            self._updating.wait()
            super()._begin().wait()

    def release(self) -> None:
        if self.asked:
            self.gathered()
        for each in (self.bytes, self.weights):
            free(each)
        self.rest()

    def rest(self) -> None:
        free(self.transposed)
        self._made.clear()

    def updated(self, updating: Work | None = None) -> None:
        super().updated(updating)
        self.stale = True

    def settle(self) -> None:
        """What follows may quantize this rank's range anew: the others have read it."""
        if (peers := self._gather.peer_memory) is not None:
            peers.settle(self.own_bytes)

    def transpose(self, matrix: Matrix) -> None:
        """Make the copy across of what has come, unless there is one: each place uses it as often as a section comes
        in parts."""
        if not here(self.transposed):
            allocate(self.transposed)
        if matrix not in self._made:
            self.quantizer.transpose_(matrix.bytes_across, matrix.bytes)
            self._made.add(matrix)

    def quantize(self, scales: Tensor) -> None:
        """This rank's range by the scales [n] of the whole matrices."""
        self.settle()
        self.scales.copy_(scales)
        for out, part, scale in self._quantized:
            self.quantizer.quantize_(out, part, scale)
        self.stale = False


@torch.no_grad()
def quantize(buckets: Sequence[QuantizedBucket]) -> None:
    """Quantize the ranges of this rank, by scales that the ranks agree on: one small message of all buckets."""
    for bucket in buckets:
        bucket.arrive()
    parts = [part for bucket in buckets for part in bucket.parts]
    scales = buckets[0].quantizer.scales(parts, buckets[0].axis)
    for bucket, each in zip(buckets, torch.split(scales, [len(b.parts) for b in buckets]), strict=True):
        bucket.quantize(each)


def agree_at_once(buckets: Iterable[Bucket], *, apart: bool = False) -> None:
    """Let those that are quantized agree on their scales together, or each by itself."""
    found = [bucket for bucket in buckets if isinstance(bucket, QuantizedBucket)]
    for bucket in found:
        bucket.together = (bucket,) if apart else found


def matrices_of(buckets: Iterable[Bucket]) -> dict[nn.Parameter, Matrix]:
    """All that come in FP8."""
    return {p: m for bucket in buckets if isinstance(bucket, QuantizedBucket) for p, m in bucket.matrices.items()}
