"""Data parallelism: one engine for whole replicas and for every kind of sharding.

It answers the three verbs of the schedule. `reduce(stage)` is all that makes overlap of gradients: it stands before a
backward, and from then on each bucket leaves as its last gradient arrives. `unshard(stage)` asks for the weights that
the stage uses first; in the stage they are gathered section by section (`Sections`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn

from stretto.collectives import all_reduce_
from stretto.distributed.axes import gather_axis
from stretto.distributed.bucket import Bucket
from stretto.distributed.foreign_optimizer import reject_steps
from stretto.distributed.grouping import fill_buckets, fill_units
from stretto.distributed.handed_over import HandedOver, require_own
from stretto.distributed.main_gradients import MainGradients
from stretto.distributed.partial import Gradient, sum_partial_gradients
from stretto.distributed.progress import Progress
from stretto.distributed.quantized import QuantizedBucket, Quantizer, agree_at_once, matrices_of
from stretto.distributed.region import take_turns
from stretto.distributed.replicate import require_no_newcomers, require_single
from stretto.distributed.sections import Sections, outside_of, sections_of
from stretto.layout.flat import overlap
from stretto.parallel_state import ParallelState
from stretto.params import Declared, Part, collect
from stretto.schedule import DDP, Sharding

GRADIENTS: Final = 2
"""Buckets whose gradients may have memory at a time, where that comes and goes: one that fills, one that is reduced."""


class DataParallel(Progress):
    """The weights of this rank's stages: buckets, what fills them, and what gathers them.

    `stages` maps the number of each stage on this rank to its module; `direct` is what its layers were built with,
    if they add weight gradients up themselves. Buckets have `bucket_mb` of gradients; where parameters are sharded,
    one holds a section of a stage, of which the last `keep` stay whole between forward and backward; what
    `quantizer` takes is gathered quantized. `visits` says of each UNSHARD of a stage in a step whether a backward
    follows; otherwise a forward does. Gradients travel in the dtype `wire`, where there is one. Raises ValueError
    for undeclared parameters, and for two copies of one logical tensor, such as a tied embedding, in stages of this
    rank.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        state: ParallelState,
        *,
        bucket_mb: float = 25.0,
        direct: MainGradients | None = None,
        sharding: Sharding = DDP,
        keep: int = 0,
        visits: Mapping[int, Sequence[bool]] | None = None,
        wire: torch.dtype | None = None,
        quantizer: Quantizer | None = None,
    ) -> None:
        require_own(stages.values())
        self.state, self.wire, self._quantizer = state, wire, quantizer
        self.norms: tuple[list[str], Tensor] = [], torch.zeros(0)
        """Names of the gradients that this rank counts, and their norms [n] when the gradient's was last computed."""
        self._visits, self._visited = visits or {}, Counter[int]()
        self._levels = "dp.0" in state.layout.axes  # shards lie along the inner one, copies along the outer one
        self.sharding = sharding if state.axis(*self._over(("dp", "cp"))).size > 1 else DDP
        self._each = sharding.reduce_each
        self.declared: tuple[Declared, ...] = ()
        self.buckets: dict[int, list[Bucket]] = {}
        self._reducing: deque[Bucket] = deque()
        held: set[nn.Parameter] = set()
        for stage, module in stages.items():
            declared = collect(module, elsewhere=held)
            self.declared += declared
            held |= {each.param for each in declared}
            groups = fill_buckets(declared, bucket_mb * 2**20)
            if self.sharding.params:
                parts, takes = sections_of(module), None if quantizer is None else quantizer.takes
                groups = fill_units(declared, parts, takes, outside_of(module, parts))
            self.buckets[stage] = [self._bucket(group) for group in groups]
            agree_at_once(self.buckets[stage])
        require_single(self.declared)
        self._home = {item.param: b for b in self.all_buckets for item in b.items}
        if quantizer is not None:
            quantizer.give(matrices_of(self.all_buckets))
        self._stages, self._keep = stages, keep
        self._sections: dict[int, Sections] = {}
        self._asks_ahead = self.sharding.params and len(stages) == 1
        if self.sharding.state:
            self._watch_sections()
        if self.sharding.params and self.wire is None:
            self._share_regions()
        self._unsent: deque[Bucket] = deque()
        self._ignoring = False
        self._complete = False
        """Whether a step has shown that all that learns is held here."""
        self._main_gradients = MainGradients() if direct is None else direct
        self._main_gradients.bind(self._home, self._send_full)
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for p in self._home
            if p.requires_grad
        ]
        self._guards = HandedOver(stages.values(), self._home)
        self._accept_steps = reject_steps(self)

    def wait_by_section(self) -> None:
        """From now on each section waits for its own weights alone: they may be updated beside the forward."""
        self._watch_sections()
        self._asks_ahead = False
        agree_at_once(self.all_buckets, apart=True)

    def _watch_sections(self) -> None:
        """Weights may be on their way: a section waits for them before it is used."""
        for stage, module in self._stages.items():
            if stage not in self._sections:
                self._sections[stage] = Sections(module, sections_of(module), self._home, keep=self._keep)

    def follow(self, visits: Mapping[int, Sequence[bool]]) -> None:
        """From the next step on the program is another one, with these visits."""
        self._visits = visits

    def unshard(self, stage: int) -> None:
        """Begin to gather what the stage uses first, if weights are sharded."""
        if self.sharding.params:
            told, number = self._visits.get(stage, ()), self._visited[stage]
            training = torch.is_grad_enabled()
            self._sections[stage].begin(backward=training and number < len(told) and told[number])
            self._visited[stage] += training

    def reshard(self, stage: int) -> None:
        """Let go of the stage's gathered weights, if they are sharded."""
        if self.sharding.params:
            self._sections[stage].release()

    def reduce(self, stage: int) -> None:
        """The next backward of the stage is its last of this step, or of this sum: buckets leave as they fill."""
        if self._ignoring:
            return
        self._main_gradients.flush()  # of an earlier backward: not among the last ones
        # Where weight gradients of the stage wait for a W that comes next, all others came with the last I.
        here = {param for bucket in self.buckets[stage] for param in bucket.params}
        waiting = here & self._main_gradients.deferred.weights()
        if self._each and not self.sharding.grads:  # one rank: nothing to send in each microbatch
            return
        for bucket in self.buckets[stage]:
            if bucket.frozen or (self._each and not bucket.sharding.grads):  # alone with its parameters
                continue
            if self.sharding.grads and bucket.due and bucket in self._unsent:
                self._unsent.remove(bucket)
                self._send(bucket)
            if self.sharding.grads and bucket.sent:
                bucket.wait()
            bucket.arm(waiting or None)
            self._unsent.append(bucket)
        self._send_full()

    def finish(self) -> None:
        """Wait for the reductions, then sum what replicated parameters hold parts of. Gradients are whole after it.

        A bucket that did not fill in the last backward, or was never armed, leaves only now: right, but not
        overlapped. Raises RuntimeError naming parameters that got no gradient in the whole step.
        """
        self._main_gradients.flush()
        self.require_gradients()
        if not self._complete:
            require_no_newcomers(self._stages, self._home)
            self._complete = True
        for bucket in dict.fromkeys((*self._unsent, *self.all_buckets)):
            if bucket.due:
                self._send(bucket)
        self._unsent.clear()
        for bucket in self.all_buckets:
            bucket.wait()
            bucket.settle()
        if self._levels and self.sharding.state:
            copies = [(bucket, self.state.axis(f"{bucket.replicas[0]}.1")) for bucket in self.all_buckets]
            for work in [all_reduce_(bucket.grad, axis) for bucket, axis in copies if not bucket.frozen]:
                work.wait()
        if late := [name for bucket in self.all_buckets for name in bucket.late]:
            raise RuntimeError(
                f"gradients of {', '.join(late)} came after their bucket was sent: reduce(stage) must stand before "
                "each backward that adds to sharded gradients"
            )
        for sections in self._sections.values():
            sections.release()
        sum_partial_gradients(self.gradients, self.state)

    @cached_property
    def gradients(self) -> list[Gradient]:
        """This rank's rectangles of the gradient of each logical tensor, after `finish`."""
        return [
            Gradient(part, list(part.pieces(stored)), stored.flat)
            for item in self.declared
            if item.param.requires_grad
            for stored in [self.part(item.param, lambda bucket: bucket.grad)]
            for part in item.logical
            if not self.sharding.state or overlap(part.span, stored.part)
        ]

    def part(self, param: nn.Parameter, of: Callable[[Bucket], Tensor]) -> Part:
        """What this rank has of a stored parameter in a flat tensor of its bucket's own range."""
        bucket = self._home[param]
        return bucket.part(of(bucket), param)

    def grad(self, param: nn.Parameter) -> Tensor:
        """The accumulated gradient of a stored parameter, where gradients are not sharded."""
        bucket = self._home[param]
        return bucket.view(bucket.grads, param)

    def ignore(self, ignoring: bool) -> None:
        """Gradients of a program that is run in vain go nowhere, and those that are there stay."""
        self._ignoring = ignoring
        for bucket in self.all_buckets:
            bucket.ignoring = ignoring

    def zero(self) -> None:
        """Begin a step."""
        self._unsent.clear()
        self._reducing.clear()
        self._visited.clear()
        self._main_gradients.forget()
        for bucket in self.all_buckets:
            bucket.zero()

    def position(self) -> dict[str, int]:
        """This rank's place on the axes along which what it keeps may be repeated: all but those of shards."""
        cut = self._over(("dp", "cp", "edp")) if self.sharding.state else ()
        at = self.state.layout.position(self.state.world.rank)
        return {axis: place for axis, place in at.items() if axis not in cut and axis.partition(".")[0] not in cut}

    def close(self) -> None:
        """Take the hooks off the parameters and modules."""
        self._guards.close()
        for hook in self._hooks:
            hook.remove()
        for sections in self._sections.values():
            sections.close()
        self._accept_steps()

    def _bucket(self, group: Sequence[Declared]) -> Bucket:
        names = self._over(group[0].replicas) if self.sharding.state else group[0].replicas
        axis = self.state.axis(*names)
        gather = gather_axis(self.state, names) if self.sharding.state else axis
        options: dict[str, Any] = {"gather": gather, "room": self._room, "wire": self.wire}
        if self.sharding.params and self._quantizer is not None and self._quantizer.takes(group[0].param):
            return QuantizedBucket(group, axis, self.sharding, self._quantizer, **options)
        return Bucket(group, axis, self.sharding, **options)

    def _share_regions(self) -> None:
        """Buckets of which each is used by one section fill one after the other."""
        used = [bucket for each in self._sections.values() for section in each.uses for bucket in section]
        turns = [bucket for bucket in used if used.count(bucket) == 1 and not bucket.frozen and bucket.sharding.grads]
        taken = take_turns([(each.axis, each.flat.numel, each.grad_dtype) for each in turns], GRADIENTS)
        for bucket, region in zip(turns, taken, strict=True):
            bucket.region = region

    def _over(self, replicas: Sequence[str]) -> tuple[str, ...]:
        """The axes along which shards lie, of those that hold replicas."""
        return tuple(f"{name}.0" if name in ("dp", "edp") and self._levels else name for name in replicas)

    def _room(self) -> None:
        """At most `GRADIENTS` buckets have memory for gradients: wait for what is being reduced."""
        while len(self._reducing) >= GRADIENTS:
            self._reducing.popleft().wait()

    def _arrived(self, param: nn.Parameter) -> None:
        """Take the gradient that autograd just finished for `param`."""
        grad = param.grad
        if grad is None:  # autograd ran the hook, but the layer put its gradient off, or added it up itself
            return
        bucket = self._home[param]
        dense = grad.to_dense() if grad.is_sparse else grad  # of `nn.Embedding(sparse=True)`
        bucket.add(param, lambda total, first_microbatch: total.copy_(dense) if first_microbatch else total.add_(dense))
        param.grad = None
        bucket.look(param)
        bucket.arrived(param)
        self._send_full()

    def _send_full(self) -> None:
        """Send what is full, in the one order that all ranks share.

        Ranks whose graphs differ fill their buckets in different orders, and sums of different buckets must not meet.
        """
        while self._unsent and self._unsent[0].full:
            self._send(self._unsent.popleft())

    def _send(self, bucket: Bucket) -> None:
        if self.wire is not None:  # what is under way has copies
            self._room()
        bucket.send()
        if self.sharding.grads or self.wire is not None:
            self._reducing.append(bucket)
