"""How far the gradients of a step have come, as what replays recorded microbatches must know and tell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self

from torch import nn

from stretto.distributed.bucket import Bucket
from stretto.distributed.handed_over import unlike_shard
from stretto.distributed.main_gradients import MainGradients
from stretto.distributed.sections import Sections
from stretto.exchange import all_gather_json
from stretto.parallel_state import ParallelState
from stretto.world import Work

WRITTEN: Final = (
    "the weights of {} were assigned or written in place after the module was handed over: masters and shards do not "
    "follow, and the next update would undo it; change weights before that"
)


class Progress(ABC):
    """The part of data parallelism that a recording of kernels does not hold."""

    state: ParallelState
    buckets: Mapping[int, Sequence[Bucket]]
    _main_gradients: MainGradients
    _home: Mapping[nn.Parameter, Bucket]
    _sections: Mapping[int, Sections]
    _asks_ahead: bool
    """Whether the first sections of a step are asked for as soon as they are updated."""
    lent: bool = False
    """Whether weights were to be read whole since an update, and may have been written to."""
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
        """All parameters can be read on every rank. Raises RuntimeError after it where they were written to, and their
        shards were not."""
        for bucket in self.all_buckets:
            bucket.make_whole()
        self.lent = True
        written: list[str] = []
        try:
            yield
            written = [name for bucket in self.all_buckets for name in unlike_shard(bucket)]
        finally:
            for bucket in self.all_buckets:
                bucket.release()
        if any(bucket.sharding.params for bucket in self.all_buckets):
            self.require_unwritten(written)

    def require_unwritten(self, written: Sequence[str]) -> None:
        """Raise RuntimeError on all data-parallel ranks where one found weights that were written to."""
        told = all_gather_json(list(written), self.state.axis("dp", "cp"))
        if names := list(dict.fromkeys(name for each in told for name in each)):
            raise RuntimeError(WRITTEN.format(", ".join(names)))

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
            raise RuntimeError(WRITTEN.format(", ".join(written)))
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

    def forget(self) -> None:
        """Begin a step in the place of one that is not to be finished: what its backwards added is dropped."""
        for bucket in self.all_buckets:
            bucket.wait()
            bucket.settle()
        for sections in self._sections.values():
            sections.release()
        self.zero()

    @abstractmethod
    def zero(self) -> None:
        """Begin a step."""

    @abstractmethod
    def close(self) -> None:
        """Take the hooks off the parameters and modules."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
