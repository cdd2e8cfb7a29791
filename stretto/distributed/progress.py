"""How far the gradients of a step have come, as what replays recorded microbatches must know and tell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from torch import nn

from stretto.distributed.bucket import Bucket
from stretto.distributed.main_gradients import MainGradients
from stretto.distributed.sections import Sections
from stretto.world import Work


class Progress(ABC):
    """The part of data parallelism that a recording of kernels does not hold."""

    buckets: Mapping[int, Sequence[Bucket]]
    _main_gradients: MainGradients
    _home: Mapping[nn.Parameter, Bucket]
    _sections: Mapping[int, Sections]
    _asks_ahead: bool
    """Whether the first sections of a step are asked for as soon as they are updated."""
    allow_unused: bool = False
    """Whether what gets no gradient in a step has 0, in the place of an error."""

    @property
    def all_buckets(self) -> list[Bucket]:
        """The buckets of every stage on this rank."""
        return [bucket for buckets in self.buckets.values() for bucket in buckets]

    def name_of(self, param: nn.Parameter) -> str | None:
        """The name of a parameter that is trained here."""
        bucket = self._home.get(param)
        return None if bucket is None or bucket.frozen else bucket.name_of(param)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters can be read on every rank."""
        for bucket in self.all_buckets:
            bucket.make_whole()
        yield
        for bucket in self.all_buckets:
            bucket.release()

    def progress(self, stage: int) -> tuple[Any, ...]:
        """Which gradients of the stage there are in this step, to be hashed and compared; none is deferred after it."""
        self._main_gradients.flush()
        return tuple(bucket.progress for bucket in self.buckets[stage])

    def resume(self, stage: int, progress: Any) -> None:
        """It is as it was when `progress` was asked for: a recording of what was done since is replayed, or undone."""
        self._main_gradients.forget()
        for bucket, each in zip(self.buckets[stage], progress, strict=True):
            bucket.progress = each

    def reduces(self, stage: int) -> bool:
        """Whether gradients of the stage are summed over ranks."""
        return any(bucket.axis.size > 1 for bucket in self.buckets[stage])

    def require_gradients(self) -> None:
        """Raise RuntimeError naming what learns and got no gradient in the whole step, and what learns only by now."""
        frozen = [p for bucket in self.all_buckets if bucket.frozen for p in bucket.params]
        if thawed := [self._home[p].name_of(p) for p in frozen if p.requires_grad]:
            raise RuntimeError(
                f"{', '.join(thawed)} had requires_grad=False when the module was handed over, so nothing sums its "
                "gradient or updates it: hand the module over again when that has changed"
            )
        if written := [name for bucket in self.all_buckets for name in bucket.written]:
            raise RuntimeError(
                f"the weights of {', '.join(written)} were assigned or written in place after the module was handed "
                "over: masters and shards do not follow, and the next update would undo it; change weights before that"
            )
        if self.allow_unused:
            return
        if missing := [name for bucket in self.all_buckets for name in bucket.missing]:
            raise RuntimeError(
                f"no gradient reached {', '.join(missing)}: the loss does not depend on them, or they were frozen "
                "after the module was handed over; remove them from the module or use them in its forward "
                "(allow_unused=True, of shard and Trainer, takes 0)"
            )

    def require_summed(self) -> None:
        """Raise RuntimeError where gradients are not summed over the ranks: with an update replicas would part ways."""
        if not all(bucket.summed for bucket in self.all_buckets):
            raise RuntimeError(
                "gradients are not summed over the ranks yet: finish() of the weights comes before step()"
            )

    def updated(self, bucket: Bucket, updating: Work) -> None:
        """A step's update of a bucket is launched: what the next step uses first is on its way beside the others'."""
        bucket.updated(updating)
        if self._asks_ahead:
            for sections in self._sections.values():
                sections.updated(bucket)

    def settle(self) -> None:
        """Wait for what is on its way between two steps: nothing is, when the groups are left in good order."""
        for bucket in self.all_buckets:
            bucket.arrive()
            bucket.settle()

    @abstractmethod
    def close(self) -> None:
        """Take the hooks off the parameters and modules."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
