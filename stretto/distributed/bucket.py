"""A bucket: parameters that lie one behind the other in flat storage, gathered, reduced and updated as one.

The parameters are views of `weights` (their own dtype), and their gradients add up in `grads` (fp32, or fp64 for fp64
parameters: 256 + 1 in bf16 would stay 256). `Sharding` says which of three things a rank keeps only its `own` range
of: the optimizer's state, the gradients, the weights. What is not kept is memory that comes and goes; its tensors and
their views stay, so nothing is ever copied in or out: an all-gather writes where the GEMM reads, and a
reduce-scatter reads where it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from stretto.collectives import all_gather_into, all_reduce_, nothing, reduce_scatter_into
from stretto.distributed.arrivals import Arrivals
from stretto.distributed.memory import allocate, free, here, zeros
from stretto.distributed.region import Region
from stretto.distributed.wire import WireSum
from stretto.layout.flat import Flat, overlap
from stretto.params import Declared, Logical, Part
from stretto.schedule import DDP, Sharding
from stretto.world import Axis, Done, Work

K = TypeVar("K")


class Bucket(Arrivals):
    """Flat storage of some parameters of one stage with the same dtype and replicas.

    `axis` is what gradients are reduced over and what is sharded lies along, `gather` the same ranks with a
    communicator for weights. `room` is called before gradients that come and go get their memory. Over one rank
    nothing is sharded. Parameters that want no gradient (`frozen`) have weights alone.
    """

    shares = True
    """Whether the others read the shard: GEMMs read weights in their own dtype."""
    independent = True
    """Whether it can be gathered before other buckets are updated."""
    ignoring = False
    """Whether gradients go nowhere: those that are there are still needed."""

    def __init__(
        self,
        items: Sequence[Declared],
        axis: Axis,
        sharding: Sharding = DDP,
        *,
        gather: Axis | None = None,
        room: Callable[[], object] = nothing,
        wire: torch.dtype | None = None,
    ) -> None:
        """Move the parameters into flat storage."""
        self.items, self.axis, self.room, self.wire = tuple(items), axis, room, wire
        self.sharding = sharding if axis.size > 1 else DDP
        self._gather = axis if gather is None else gather
        first = items[0].param
        self.frozen = not first.requires_grad
        self.grad_dtype = torch.promote_types(first.dtype, torch.float32)
        self.flat = Flat(tuple(item.param.numel() for item in items), axis.size if self.sharding.state else 1)
        self.own = self.flat.shard(axis.rank if self.sharding.state else 0)
        self._spans = {item.param: span for item, span in zip(items, self.flat.spans, strict=True)}
        peers = self._gather.peer_memory if self.sharding.state else None
        kept_whole = self.sharding.state and not self.sharding.params
        self.weights = zeros(self.flat.numel, first, first.dtype, peers if kept_whole else None)
        for item in items:
            view = self.view(self.weights, item.param)
            if here(item.param.data):
                view.copy_(item.param.data)
            item.param.data = view
        self._versions = {item.param: item.param._version for item in items}
        self.shard = self._mine(self.weights)
        if self.sharding.params:
            read = peers if self.shares else None
            self.shard = zeros(self.shard.numel(), first, first.dtype, read).copy_(self.shard)
            free(self.weights)
        size = 0 if self.frozen else self.flat.numel
        summed_whole = self.sharding.state and not self.sharding.grads and wire is None
        self.grads = zeros(size, first, self.grad_dtype, axis.peer_memory if summed_whole else None)
        self.grad = self._mine(self.grads)
        """What this rank has of the summed gradient, after `wait`."""
        if self.sharding.grads:
            self.grad = self.grad.clone()
            free(self.grads)
        self._nowhere = self.grads
        stays = not (self.frozen or self.sharding.grads)
        self._totals = {param: self.view(self.grads, param) for param in self._spans if stays}
        self.region: Region | None = None
        """Where gradients that come and go are, if others read them there."""
        self._gathering: Work | None = None
        self._updating: Work = Done()
        self._without = set(self._spans)  # no gradient in this step yet
        self._fresh = set(self._spans)  # none yet in what is there of `grads`
        self._waiting: set[nn.Parameter] | None = None  # once armed: the last gradient still to come
        self.sent = self._reduced = False
        self._work: Work | None = None
        self.watch: Callable[[str, Tensor], object] | None = None
        """Told of each parameter whose gradient of a backward is all there."""

    def view(self, flat: Tensor, param: nn.Parameter) -> Tensor:
        """The part of a whole `flat` (weights, grads) that belongs to `param`, in its shape."""
        span = self._spans[param]
        return flat[span.start : span.stop].view(param.shape)

    def part(self, own: Tensor, param: nn.Parameter) -> Part:
        """What of `param` is in a tensor of this rank's range (shard, grad, a master, a moment), or of its end."""
        span = self._spans[param]
        held = range(self.own.stop - own.numel(), self.own.stop)
        inside = overlap(held, span)
        flat = own[inside.start - held.start : inside.stop - held.start]
        return Part(flat, range(inside.start - span.start, inside.stop - span.start))

    def span(self, item: Declared, logical: Logical) -> range:
        """Where a logical tensor lies in whole flat storage, padding included."""
        start = self._spans[item.param].start
        return range(start + logical.span.start, start + logical.span.stop)

    def segments(self, key: Callable[[Declared, Logical], K]) -> Iterator[tuple[slice, K]]:
        """Ranges of what is this rank's, each with the key that its logical tensors have in common."""
        every = [(self.span(item, part).start, key(item, part)) for item in self.items for part in item.logical]
        runs = [next(run) for _, run in groupby(every, lambda each: each[1])]
        for (begin, common), (end, _) in pairwise([*runs, (self.flat.numel, None)]):
            inside = overlap(self.own, range(begin, end))
            if inside and common is not None:
                yield slice(inside.start - self.own.start, inside.stop - self.own.start), common

    # The weights: whole from `gather` to `release`, or always.

    @property
    def whole(self) -> bool:
        """Whether the weights have memory: they are whole, or on their way."""
        return here(self.weights)

    @property
    def asked(self) -> bool:
        """Whether what GEMMs read of the weights is whole, or on its way."""
        return self.whole

    def gather(self) -> None:
        """Begin to make whole what GEMMs read, unless it is, or is on its way."""
        if not self.asked:
            self._updating.wait()
            self._gathering = self._begin()

    def _begin(self) -> Work:
        allocate(self.weights)
        return all_gather_into(self.weights, self.shard, self._gather)

    def make_whole(self) -> None:
        """What follows sees whole weights in their own dtype, until `release`."""
        self.gathered()

    def gathered(self) -> None:
        """What follows sees what GEMMs read."""
        self.gather()
        if self._gathering is not None:
            self._gathering.wait()
        self._gathering = None
        self._updating.wait()

    def arrive(self) -> None:
        """What follows sees the last update; nothing of this bucket is on its way."""
        if self.asked:
            self.gathered()
        self._updating.wait()

    def release(self) -> None:
        """Let go of what is another rank's, where weights are sharded."""
        if self.sharding.params and self.whole:
            self.gathered()
            free(self.weights)

    def rest(self) -> None:
        """Let go of what only the pass reads that has ended with it."""

    def updated(self, updating: Work | None = None) -> None:
        """This rank's shard has new values, or will have them with `updating`, launched on the current stream: the
        others' are on their way, or will be gathered."""
        if self.sharding.params:
            self.release()
        elif self.sharding.state:
            self.gathered()
            self._gathering = all_gather_into(self.weights, self.shard, self._gather)
        self._updating = updating or Done()

    def settle(self) -> None:
        """What follows may write this rank's shard: the others have read it."""
        if (peers := self._gather.peer_memory) is not None:
            peers.settle(self.shard)

    # The gradients: added up in `grads`, summed over the ranks into `grad`.

    def add(self, param: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        """Let `write(total, first_microbatch)` add a gradient of `param`, or set it where it is the first.

        Raises RuntimeError when the bucket has left: the gradient would be lost to the other ranks.
        """
        if self.frozen or self.ignoring:
            return
        if self.sent and not self.sharding.grads:
            raise RuntimeError(
                f"a gradient of {self.name_of(param)} came after its bucket was sent: "
                "reduce(stage) must stand before the stage's last backward of the step, zero() before its first; after "
                "shard(microbatches=) a step is so many backwards, and step() of its own optimizer; a module that is "
                "called twice under a checkpoint takes use_reentrant=False"
            )
        self._open()
        total = self._totals.get(param)
        write(self.view(self.grads, param) if total is None else total, param in self._fresh)
        self._fresh.discard(param)
        self._without.discard(param)

    def look(self, param: nn.Parameter) -> None:
        """Tell who watches that a microbatch has added to the gradient of `param`."""
        if self.watch is not None and not self.frozen:
            self.watch(self.name_of(param), self.view(self.grads, param))

    def arrived(self, param: nn.Parameter) -> None:
        """Every gradient of `param` in this backward was added."""
        if self._waiting is not None:
            self._waiting.discard(param)

    def send(self) -> None:
        """Begin to sum the gradients over the axis; of what has none they are 0."""
        if self.sharding.grads:
            self._open()
        for param in self._fresh:
            self.view(self.grads, param).zero_()
        if not self.sharding.state and self.wire is not None and self.axis.size > 1:
            self._work = WireSum(self.grads, self.axis, self.wire)
        elif not self.sharding.state:
            self._work = all_reduce_(self.grads, self.axis)
        else:
            if self.region is not None:
                self.grads = self.region.filled(self, self.grads)
            if self.wire is None:
                self._work = reduce_scatter_into(self.grad, self.grads, self.axis, add=self._reduced)
            else:
                self._work = WireSum(self.grads, self.axis, self.wire, self.grad, add=self._reduced)
        self.sent = True

    def wait(self) -> None:
        """What follows sees the summed gradients, where they are sharded added to those of earlier sums."""
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        if not self.sharding.grads:
            return
        self._close()
        self._reduced, self.sent, self._waiting, self._fresh = True, False, None, set(self._spans)

    def zero(self) -> None:
        """Forget the gradients: a new step begins. The first of each parameter is written over what is there."""
        self._fresh, self._waiting, self.sent = set(self._spans), None, False
        self._without, self._reduced = set(self._spans), False
        if self.axis.peer_memory is not None and not self.sharding.grads:
            self.axis.peer_memory.settle(self.grads)
        if self.sharding.grads and here(self.grads):
            self.wait()
            self._close()
            self._reduced = False

    def _open(self) -> None:
        """Memory for gradients, if they come and go; what no parameter will write is 0."""
        if not self.sharding.grads:
            return
        if self.sent:
            self.wait()
        if not here(self.grads):
            self.room()
            if self.region is not None:
                self.grads = self.region.enter(self, self.flat.numel)
            else:
                allocate(self.grads)
            for gap in self.flat.gaps:
                self.grads[gap.start : gap.stop].zero_()

    def _close(self) -> None:
        """No memory for gradients."""
        if self.region is not None:
            self.region.leave(self)
            self.grads = self._nowhere
        else:
            free(self.grads)

    def give_way(self) -> None:
        """Another bucket needs the region that this one's gradients are in."""
        if self.sent:
            self.wait()
        else:
            self.grads = self.grads.clone()

    def _mine(self, flat: Tensor) -> Tensor:
        return flat[self.own.start : self.own.stop]
