"""Masters of parameters: the shard itself, a wider vector beside it, or the shard and a remainder of 16 bits.

All are fp32 or wider numbers of this rank's own range of each bucket; those of frozen parameters are the shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from stretto.distributed.bucket import Bucket
from stretto.distributed.remainder import joined, parted
from stretto.distributed.residence import Residence
from stretto.layout.chunks import chunks


class Masters:
    """What is kept of the masters of some buckets, where `residence` says, and the ways in and out."""

    def __init__(self, buckets: Sequence[Bucket], residence: Residence, *, remainder: bool) -> None:
        """Masters of the parameters as they are. Raises ValueError for a remainder of what is not in bf16."""
        if remainder and (other := {b.shard.dtype for b in buckets if not b.frozen} - {torch.bfloat16}):
            raise ValueError(f"masters with a remainder are of weights in bfloat16, these are in {other.pop()}")
        self.buckets, self.residence, self.remainder = buckets, residence, remainder
        self.kept = [self._of(bucket) for bucket in buckets]
        """A vector for each bucket: of masters, or of remainders."""
        self._lent: list[Tensor] | None = None

    def _of(self, bucket: Bucket) -> Tensor:
        if bucket.frozen or bucket.shard.dtype == bucket.grad_dtype:
            return bucket.shard
        if self.remainder:
            return self.residence.empty(len(bucket.shard), torch.int16).zero_()
        return self.residence.empty(len(bucket.shard), bucket.grad_dtype).copy_(bucket.shard)

    def split(self, n: int) -> bool:
        """Whether the masters of a bucket are its shard and a remainder."""
        return self.remainder and not self.buckets[n].frozen

    @contextmanager
    def wide(self, n: int) -> Iterator[Tensor]:
        """The masters of a bucket, on the device, to be changed: in the memory of its gradients where they are not
        there as such."""
        bucket = self.buckets[n]
        if not self.split(n) and self.kept[n].device == bucket.shard.device:
            yield self.kept[n]
            return
        self._read(n, bucket.grad)
        yield bucket.grad
        self._write(n, bucket.grad)
        bucket.grad.zero_()

    def unlike(self) -> list[str]:
        """Parameters whose weights are not their masters, rounded: they were written to behind the back of these.

        Where both lie whole on the device; the host waits.
        """
        flags: list[tuple[str, Tensor]] = []
        for bucket, kept in zip(self.buckets, self.kept, strict=True):
            apart = kept is not bucket.shard and kept.dtype == bucket.grad_dtype and kept.device == bucket.shard.device
            for item in bucket.items if apart and not bucket.sharding.params else ():
                now, master = (bucket.part(x, item.param).flat for x in (bucket.shard, kept))
                flags.append((item.name, ((now != master.to(now.dtype)) & (now == now)).any()))
        wrong = torch.stack([flag for _, flag in flags]).tolist() if flags else []
        return [name for (name, _), other in zip(flags, wrong, strict=True) if other]

    def lend(self) -> list[Tensor]:
        """Masters of each bucket, to be read, or filled before `take_back`: where a remainder must be added, copies on
        the host."""
        self._lent = [self._copy(n) if self.split(n) else kept for n, kept in enumerate(self.kept)]
        return self._lent

    def take_back(self) -> None:
        """What was lent may have been filled."""
        for n, masters in enumerate(self._lent or ()):
            if self.split(n):
                self._write(n, masters)
        self.forget()

    def forget(self) -> None:
        """What was lent is no longer what the masters are."""
        self._lent = None

    def publish(self) -> None:
        """The parameters follow."""
        for n, bucket in enumerate(self.buckets):
            if self.kept[n] is not bucket.shard and not self.split(n):
                bucket.shard.copy_(self.kept[n])
            bucket.updated()

    def _copy(self, n: int) -> Tensor:
        copy = torch.empty(len(self.kept[n]), dtype=self.buckets[n].grad_dtype)
        self._read(n, copy)
        return copy

    def _read(self, n: int, into: Tensor) -> None:
        shard, kept = self.buckets[n].shard, self.kept[n]
        for each in chunks(len(shard)):
            part = slice(each.start, each.stop)
            into[part] = joined(shard[part], kept[part].to(shard.device)) if self.split(n) else kept[part]

    def _write(self, n: int, masters: Tensor) -> None:
        shard, kept = self.buckets[n].shard, self.kept[n]
        for each in chunks(len(shard)):
            part = slice(each.start, each.stop)
            if self.split(n):
                shard[part], kept[part] = parted(masters[part].to(shard.device))
            else:
                kept[part] = masters[part]
