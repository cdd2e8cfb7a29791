"""Weight gradients that layers add up in the buckets themselves, in the product that computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from stretto.deferred import Deferred
from stretto.distributed.bucket import Bucket


class MainGradients:
    """What layers are built with (`stretto.tensor_parallel.Accumulators`), before there are buckets.

    Each place that uses a weight `expect`s it once, and `add`s once in each backward. With the last of them the weight
    has all of its gradient of this backward: a tied embedding has two.
    """

    def __init__(self) -> None:
        self._uses: Counter[nn.Parameter] = Counter()
        self._added: dict[nn.Parameter, int] = {}  # where not all uses of a backward have added
        self._early: set[nn.Parameter] = set()  # whose gradient comes in the forward, or a part of it
        self._home: Mapping[nn.Parameter, Bucket] = {}
        self._send_full: Callable[[], None] = _nothing
        self.deferred = Deferred()
        """Gradients that are not added yet: of a W, or covered by the next collective."""

    def expect(self, weight: nn.Parameter) -> None:
        """One more place uses `weight`."""
        self._uses[weight] += 1

    def bind(self, home: Mapping[nn.Parameter, Bucket], send_full: Callable[[], None]) -> None:
        """From now on gradients go to the buckets of `home`; `send_full` is called whenever one may be full."""
        self._home, self._send_full = home, send_full

    def add_in_forward(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        """Let `write` add what is known in a forward; the backward then calls `complete`.

        Raises RuntimeError when its bucket has left.
        """
        bucket = self._home[weight]
        bucket.add(weight, write)
        self._early.add(weight)
        bucket.look(weight)  # before the forward of another microbatch adds its part

    def defer(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        """`add`, deferred until a message is under way; no longer than until the next, as it holds what it multiplies.

        Each product has one message and one weight gradient in its backward.
        """
        if not self._until_w(weight, write):
            self.deferred.behind(partial(self._add, weight, write))

    def flush(self) -> None:
        """Do what was deferred. It is no part of what is going on, of a forward, say."""
        self.deferred.flush()

    def forget(self) -> None:
        """A step begins; what is left of one that did not come to its end is not for this one."""
        self.deferred.clear()
        self._added.clear()

    def add(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        """Let `write(total, first_microbatch)` add a gradient of `weight`, or set it where it is the first of the step.

        During an I that is left to the W. Raises RuntimeError when its bucket has left.
        """
        if not self._until_w(weight, write):
            self._add(weight, write)

    def complete(self, weight: nn.Parameter) -> None:
        """The backward of a use whose gradient was added `add_in_forward`: nothing is left to add, nor to defer."""
        self._count(weight, self._home[weight])

    def _until_w(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> bool:
        return self.deferred.collecting and self.deferred.defer(weight, partial(self._add, weight, write))

    def _add(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        bucket = self._home[weight]
        if torch.is_grad_enabled():  # not in a backward, where the context would be as dear as a small kernel
            with torch.no_grad():
                bucket.add(weight, write)
        else:
            bucket.add(weight, write)
        self._count(weight, bucket)

    def _count(self, weight: nn.Parameter, bucket: Bucket) -> None:
        if (uses := self._uses[weight]) > 1:
            added = self._added.pop(weight, 0) + 1
            if added < uses:
                self._added[weight] = added
                return
        if bucket.watch is not None and weight not in self._early:
            bucket.look(weight)
        bucket.arrived(weight)
        self._send_full()


def _nothing() -> None:
    """No buckets yet."""
