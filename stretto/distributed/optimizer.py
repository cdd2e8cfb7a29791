"""The optimizer: masters (what they are, where they lie) times an update rule (how they move).

Each bucket has one long master in fp32 or wider of this rank's own range, whatever the dtype of the parameters and
whatever is sharded: a vector of its own, the shard itself where that is as wide, or the shard and a remainder. Frozen
parameters move by no rule: they are their own masters, in their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stretto.distributed.bucket import Bucket
from stretto.distributed.data_parallel import DataParallel
from stretto.distributed.masters import Masters
from stretto.distributed.muon import Orthogonalizer
from stretto.distributed.remainder import joined, on_remainder, parted
from stretto.distributed.residence import Job, Residence, Resident, Streamed, cut, end
from stretto.distributed.rules import AdamWRule, MuonRule, Rule, adamw, adamw_weights, direction, rounding
from stretto.layout.flat import overlap
from stretto.notation.param_groups import ParamGroup, unmatched
from stretto.params import Declared, Logical, Slice, fill, slices

Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]  # makes one kernel of an update: `torch.compile`, say

Written = Literal["all", "weights", "rest"]
"""What an update writes: the parameters, in their own dtype, or masters and state, or both."""


class Kind(NamedTuple):
    """What logical tensors have in common that one call of the rule updates."""

    decay: float
    lr: float
    """Multiplies the learning rate."""
    matrix: bool
    """Whether Muon orthogonalizes it."""


class Optimizer:
    """Masters and the state of a rule, updated in one pass over memory and published to the parameters.

    Where parameters are narrower than fp32 each bucket's shard gets the rounded master with every step; otherwise the
    shard is the master. With `remainder` bf16 shards and 16 bits more are the masters (`distributed.remainder`). With
    `cpu_offload` all that is no weight or gradient lies in the host's memory (`distributed.residence`). `groups` say
    what is otherwise for some parameters, by name. The rule's state has the dtype `moments`, or that of the masters: it
    is widened for each update, and rounded after it. `fuse` makes one kernel of the update: of AdamW, it reads
    gradient, master and moments and writes the last three and the weights, 30 bytes for a bf16 weight. Raises
    ValueError for a group without parameters, as far as this rank sees them all.
    """

    def __init__(
        self,
        weights: DataParallel,
        rule: Rule | MuonRule,
        *,
        groups: Sequence[ParamGroup] = (),
        moments: torch.dtype | None = None,
        remainder: bool = False,
        cpu_offload: bool = False,
        fuse: Fuse | None = None,
    ) -> None:
        self.weights, self.groups = weights, tuple(groups)
        self.muon = rule if isinstance(rule, MuonRule) else None
        self.rule: Rule = rule.rest if isinstance(rule, MuonRule) else rule
        names = [part.name for item in weights.declared for part in item.logical]
        everything = weights.state.axis("pp").size == 1 and not weights.state.layout.has_experts
        if everything and (none := unmatched(self.groups, names)):
            raise ValueError(
                f"no parameter has a name like {', '.join(none)}: names are such as {', '.join(names[:3])}"
            )
        self.steps = 0
        self.buckets = weights.all_buckets
        self.residence: Residence = (Streamed if cpu_offload else Resident)(weights.state.world.device)
        if cpu_offload:  # updates are launched beside the next forward
            weights.wait_by_section()
        self._masters = Masters(self.buckets, self.residence, remainder=remainder)
        self.masters = self._masters.kept
        update = self.rule.update if moments is None else rounding(self.rule.update, len(self.rule.state))
        update = on_remainder(update) if remainder else update
        self._update: Callable[..., None] = update if fuse is None else fuse(update)
        self._update_weights: Callable[..., None] = adamw_weights if fuse is None else fuse(adamw_weights)
        apart = all(each is not b.shard for each, b in zip(self.masters, self.buckets, strict=True) if not b.frozen)
        one_kernel = self._update is update or weights.state.world.device.type == "cuda"
        self.in_two = update is adamw and self.muon is None and apart and one_kernel
        """Whether an update may write the weights first, and masters and state later, to the same bits."""
        moved = [0 if b.frozen else len(b.shard) for b in self.buckets]
        starts = {name: [0] * len(moved) for name in self.rule.state}
        if self.muon is not None:
            self._orthogonalize = Orthogonalizer(self.buckets, weights.state, self.muon)
            for name in starts.keys() - {*self.muon.state}:  # of matrices there is none
                starts[name] = [0 if b.frozen else self._matrices(b).stop for b in self.buckets]
        self.state = {
            name: [
                self.residence.empty(size - start, moments or b.grad_dtype).zero_()
                for b, size, start in zip(self.buckets, moved, each, strict=True)
            ]
            for name, each in starts.items()
        }
        # The forward uses the last bucket first: what the others need of it is on its way first.
        order = reversed(range(len(self.buckets)))
        self._jobs = [job for n in order if not self.buckets[n].frozen for job in self._jobs_of(n)]
        self._segments = [self._segments_of(job) for job in self._jobs]
        self._numbers: dict[tuple[Kind, torch.dtype], list[Tensor]] = {}

    def kind(self, item: Declared, part: Logical) -> Kind:
        """How a logical tensor is updated."""
        decay, lr = self.rule.weight_decay if item.weight_decay else 0.0, 1.0
        for group in self.groups:
            if group.holds(part.name):
                decay = decay if group.weight_decay is None else group.weight_decay
                lr = lr if group.lr is None else group.lr
        return Kind(decay, lr, self.muon is not None and item.matrix)

    def initialize(self, seed: int, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Draw the initial weights that are `wanted`, by name, into the masters, and round them into the parameters.

        They are drawn on the device, where no gradient is before the first step.
        """
        self.settle()
        for n, bucket in enumerate(self.buckets):
            if drawn := [item for item in bucket.items if wanted(item.logical[0].name)]:
                with torch.no_grad(), self._masters.wide(n) as masters:
                    fill(drawn, seed, lambda p, of=bucket, masters=masters: of.part(masters, p))  # type: ignore[misc]
        with torch.no_grad():
            self._masters.publish()

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor | None = None, *, write: Written = "all") -> None:
        """Update masters and parameters from `scale` [] times the buckets' gradients.

        With `write` the weights alone are written, or the rest alone of the same update, which counts then; only where
        that can be done `in_two`.
        """
        self.weights.require_summed()
        self.steps += 1
        self._masters.forget()
        # Numbers that change are tensors, filled on the device: as Python's they would be compiled in.
        factor, self._numbers = 1.0 if scale is None else scale, {}
        for job, segments in zip(self._jobs, self._segments, strict=True):
            bucket = self.buckets[job.bucket]
            for _, of in segments:
                numbers = self._numbers.setdefault((of, bucket.grad_dtype), [])
                if not numbers and not of.matrix:
                    one = torch.ones((), dtype=bucket.grad_dtype, device=bucket.grad.device)
                    every = (factor, *self.rule.numbers(lr * of.lr, self.steps, of.decay))
                    numbers += [(one * x).to(one) for x in every]
        segments_of = iter(self._segments)
        self.residence.visit(
            self._jobs, lambda job, vectors: self._update_job(job, vectors, next(segments_of), lr, scale, write)
        )
        self.steps -= write == "weights"

    def require_own_weights(self) -> None:
        """Raise RuntimeError where weights were written to and their masters were not: an update would undo it."""
        self.weights.require_unwritten(self._masters.unlike())

    def skip(self) -> None:
        """This update is counted, and not made."""
        self.steps += 1

    def settle(self) -> None:
        """The host, and what follows, see the last update."""
        self.residence.settle()
        self.weights.settle()

    def slices(self) -> list[Slice]:
        """This rank's slices of the masters, under `model/`, and of the rule's state under its names: `exp_avg/`.

        Where masters are weights and a remainder, these are copies on the host, until the next update or `loaded`.
        """
        self.settle()
        position, weights = self.weights.position(), self.weights
        return [
            piece
            for kind, flats in {"model": self._masters.lend(), **self.state}.items()
            for piece in slices(
                [item for item in weights.declared if kind == "model" or self._has(kind, item)],
                lambda p, flats=flats: weights.part(p, self._in(flats)),  # type: ignore[misc]
                position,
                prefix=f"{kind}/",
            )
        ]

    @torch.no_grad()
    def loaded(self, steps: int) -> None:
        """The slices were filled from a checkpoint of `steps` updates: make the parameters follow."""
        self._masters.take_back()
        self.steps = steps
        self._masters.publish()

    def _update_job(
        self,
        job: Job,
        vectors: Sequence[Tensor],
        segments: Sequence[tuple[slice, Kind]],
        lr: float,
        scale: Tensor | None,
        write: Written,
    ) -> None:
        """Update a range of a bucket, of which `vectors` are on the device."""
        bucket = self.buckets[job.bucket]
        shard, grad = bucket.shard[job.part], bucket.grad[job.part]
        master, rounded, state = shard, None, vectors
        if self.masters[job.bucket] is not bucket.shard:
            master, rounded, state = vectors[0], None if write == "rest" else shard, vectors[1:]
        update = self._update_weights if write == "weights" else self._update
        flats = [master, rounded, grad, *state]
        for part, of in segments:
            if not of.matrix:
                numbers = self._numbers[of, bucket.grad_dtype]
                update(*(cut(flat, part, len(master)) for flat in flats), *numbers, *self.rule.constants)
        if self.muon is not None and self._orthogonalize.jobs[bucket]:
            momentum = state[list(self.state).index("exp_avg")]
            self._step_matrices(bucket, master, momentum, segments, lr, scale)
        if job.last and write != "rest":
            self.weights.updated(bucket, self.residence.updating())

    def _step_matrices(
        self,
        bucket: Bucket,
        master: Tensor,
        momentum: Tensor,
        segments: Sequence[tuple[slice, Kind]],
        lr: float,
        scale: Tensor | None,
    ) -> None:
        """Of Muon: the momentum where it lies, the direction of each matrix as a whole, the update where it lies."""
        assert self.muon is not None
        one = torch.ones((), dtype=bucket.grad_dtype, device=master.device)
        factor = one if scale is None else scale.to(one)
        matrices = [(part, of) for part, of in segments if of.matrix]
        moves = torch.zeros_like(master, dtype=bucket.weights.dtype)  # in which iterations are: half to send in bf16
        for part, _ in matrices:
            wide = momentum[part].to(bucket.grad_dtype)
            moves[part] = direction(wide, bucket.grad[part], factor, self.muon.momentum)
            if wide.dtype != momentum.dtype:
                momentum[part] = wide
        self._orthogonalize(bucket, moves)
        for part, of in matrices:
            new = joined(bucket.shard[part], master[part]) if self._masters.remainder else master[part]
            new.mul_(1 - lr * of.lr * of.decay).sub_(moves[part], alpha=lr * of.lr)
            if self._masters.remainder:
                bucket.shard[part], master[part] = parted(new)
            elif bucket.shard is not master:
                bucket.shard[part] = new

    def _jobs_of(self, n: int) -> Iterator[Job]:
        """A bucket, a range at a time; whole where it has matrices, which are updated as such."""
        bucket, own = self.buckets[n], [] if self.masters[n] is self.buckets[n].shard else [self.masters[n]]
        size, vectors = len(bucket.shard), [*own, *(each[n] for each in self.state.values())]
        whole = self.muon is not None and bool(self._orthogonalize.jobs[bucket])
        for part in [range(size)] if whole else self.residence.parts(size):
            within = slice(part.start, part.stop)
            yield Job(n, within, part.stop == size, tuple(end(vector, within, size) for vector in vectors))

    def _segments_of(self, job: Job) -> list[tuple[slice, Kind]]:
        """Ranges of a job's, each of one kind."""
        inside = range(job.part.start, job.part.stop)
        found = (
            (overlap(inside, range(s.start, s.stop)), of) for s, of in self.buckets[job.bucket].segments(self.kind)
        )
        return [(slice(part.start - inside.start, part.stop - inside.start), of) for part, of in found if part]

    def _matrices(self, bucket: Bucket) -> slice:
        """What of this rank's range lies before all that is updated element by element."""
        ends = [bucket.span(item, item.logical[0]).start for item in bucket.items if not item.matrix]
        return slice(0, len(overlap(bucket.own, range(min(ends, default=bucket.flat.numel)))))

    def _has(self, kind: str, item: Declared) -> bool:
        """Whether there is state of this name."""
        kept = self.muon is None or kind in self.muon.state or not item.matrix
        return item.param.requires_grad and kept

    def _in(self, flats: list[Tensor]) -> Callable[[Bucket], Tensor]:
        return dict(zip(self.buckets, flats, strict=True)).__getitem__


class AdamW(Optimizer):
    """`Optimizer` with the rule AdamW."""

    def __init__(
        self,
        weights: DataParallel,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        fuse: Fuse | None = None,
    ) -> None:
        super().__init__(weights, AdamWRule(betas, eps, weight_decay), fuse=fuse)
