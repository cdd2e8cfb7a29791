"""The optimizer: masters (where they lie) times an update rule (how they move).

Each bucket has one long master in fp32 or wider of this rank's own range, whatever the dtype of the parameters and
whatever is sharded. Frozen parameters move by no rule: they are their own masters, in their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stretto.arguments.param_groups import ParamGroup, unmatched
from stretto.distributed.bucket import Bucket
from stretto.distributed.data_parallel import DataParallel
from stretto.distributed.muon import Orthogonalizer
from stretto.distributed.rules import AdamWRule, MuonRule, Rule, direction
from stretto.layout.flat import overlap
from stretto.params import Declared, Logical, Slice, fill, slices

Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]


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
    shard is the master. `groups` say what is otherwise for some parameters, by name. The rule's state has the dtype
    `moments`, or that of the masters: it is widened for each update, and rounded after it. `fuse` makes one kernel of
    the update: of AdamW, it reads gradient, master and moments and writes the last three and the weights, 30 bytes for
    a bf16 weight. Raises ValueError for a group without parameters, as far as this rank sees them all.
    """

    def __init__(
        self,
        weights: DataParallel,
        rule: Rule | MuonRule,
        *,
        groups: Sequence[ParamGroup] = (),
        moments: torch.dtype | None = None,
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
        self.masters = [
            b.shard if b.frozen or b.shard.dtype == b.grad_dtype else b.shard.to(b.grad_dtype) for b in self.buckets
        ]
        moved = [master[:0] if b.frozen else master for b, master in zip(self.buckets, self.masters, strict=True)]
        self.state = {name: [torch.zeros_like(m, dtype=moments) for m in moved] for name in self.rule.state}
        update = self.rule.update if moments is None else _rounding(self.rule.update, len(self.rule.state))
        self._update: Callable[..., None] = update if fuse is None else fuse(update)
        if self.muon is not None:
            self._orthogonalize = Orthogonalizer(self.buckets, weights.state, self.muon)
            ends = [master[self._matrices(b).stop :] for b, master in zip(self.buckets, moved, strict=True)]
            for name in self.state.keys() - {*self.muon.state}:  # of matrices there is none
                self.state[name] = [torch.zeros_like(end, dtype=moments) for end in ends]

    def kind(self, item: Declared, part: Logical) -> Kind:
        """How a logical tensor is updated."""
        decay, lr = self.rule.weight_decay if item.weight_decay else 0.0, 1.0
        for group in self.groups:
            if group.holds(part.name):
                decay = decay if group.weight_decay is None else group.weight_decay
                lr = lr if group.lr is None else group.lr
        return Kind(decay, lr, self.muon is not None and item.matrix)

    def _matrices(self, bucket: Bucket) -> slice:
        """What of this rank's range lies before all that is updated element by element."""
        ends = [bucket.span(item, item.logical[0]).start for item in bucket.items if not item.matrix]
        return slice(0, len(overlap(bucket.own, range(min(ends, default=bucket.flat.numel)))))

    def initialize(self, seed: int, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Draw the initial weights that are `wanted`, by name, into the masters, and round them into the parameters."""
        drawn = [item for item in self.weights.declared if wanted(item.logical[0].name)]
        fill(drawn, seed, lambda p: self.weights.part(p, self._in(self.masters)))
        self._publish()

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor | None = None) -> None:
        """Update masters and parameters from `scale` [] times the buckets' gradients."""
        self.steps += 1
        factor = 1.0 if scale is None else scale
        # Numbers that change are tensors, filled on the device: as Python's they would be compiled in.
        known: dict[tuple[Kind, torch.dtype], list[Tensor]] = {}
        # The forward uses the last bucket first: what the others need of it is on its way first.
        for n, bucket in reversed(list(enumerate(self.buckets))):
            if bucket.frozen:
                continue
            master = self.masters[n]
            rounded = bucket.shard if bucket.shard is not master else None
            flats = [master, rounded, bucket.grad, *(each[n] for each in self.state.values())]
            for part, of in bucket.segments(self.kind):
                if of.matrix:
                    continue
                numbers = known.setdefault((of, master.dtype), [])
                if not numbers:
                    one = torch.ones((), dtype=master.dtype, device=master.device)
                    every = (factor, *self.rule.numbers(lr * of.lr, self.steps, of.decay))
                    numbers += [(one * x).to(one) for x in every]
                self._update(*(_cut(flat, part, len(master)) for flat in flats), *numbers, *self.rule.constants)
            self._step_matrices(n, bucket, lr, scale)
            bucket.updated()

    def skip(self) -> None:
        """This update is counted, and not made."""
        self.steps += 1

    def _step_matrices(self, n: int, bucket: Bucket, lr: float, scale: Tensor | None) -> None:
        """Of Muon: the momentum where it lies, the direction of each matrix as a whole, the update where it lies."""
        muon, master = self.muon, self.masters[n]
        if muon is None or not self._orthogonalize.jobs[bucket]:
            return
        one = torch.ones((), dtype=master.dtype, device=master.device)
        factor = one if scale is None else scale.to(one)
        segments = [(part, of) for part, of in bucket.segments(self.kind) if of.matrix]
        moves, momentum = torch.zeros_like(master), self.state["exp_avg"][n]
        for part, _ in segments:
            wide = momentum[part].to(master.dtype)
            moves[part] = direction(wide, bucket.grad[part], factor, muon.momentum)
            if wide.dtype != momentum.dtype:
                momentum[part] = wide
        self._orthogonalize(bucket, moves)
        for part, of in segments:
            master[part].mul_(1 - lr * of.lr * of.decay).sub_(moves[part], alpha=lr * of.lr)
            if bucket.shard is not master:
                bucket.shard[part] = master[part]

    def slices(self) -> list[Slice]:
        """This rank's slices of the masters, under `model/`, and of the rule's state under its names: `exp_avg/`."""
        position, weights = self.weights.position(), self.weights
        return [
            piece
            for kind, flats in {"model": self.masters, **self.state}.items()
            for piece in slices(
                [item for item in weights.declared if kind == "model" or self._has(kind, item)],
                lambda p, flats=flats: weights.part(p, self._in(flats)),  # type: ignore[misc]
                position,
                prefix=f"{kind}/",
            )
        ]

    def _has(self, kind: str, item: Declared) -> bool:
        """Whether there is state of this name."""
        kept = self.muon is None or kind in self.muon.state or not item.matrix
        return item.param.requires_grad and kept

    def loaded(self, steps: int) -> None:
        """The slices were filled from a checkpoint of `steps` updates: make the parameters follow."""
        self.steps = steps
        self._publish()

    def _publish(self) -> None:
        with torch.no_grad():
            for bucket, master in zip(self.buckets, self.masters, strict=True):
                if bucket.shard is not master:
                    bucket.shard.copy_(master)
                bucket.updated()

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


def _rounding(update: Callable[..., None], states: int) -> Callable[..., None]:
    """`update` with state that is narrower than the masters: computed wide, rounded to nearest."""

    def rounded_update(master: Tensor, rounded: Tensor | None, grad: Tensor, *rest: Any) -> None:
        wide = [state.to(master.dtype) for state in rest[:states]]
        update(master, rounded, grad, *wide, *rest[states:])
        for state, new in zip(rest[:states], wide, strict=True):
            state.copy_(new)

    return rounded_update


def _cut(flat: Tensor | None, part: slice, size: int) -> Tensor | None:
    """The part of a flat tensor, or of the end of one of `size` elements: itself where that is all of it."""
    if flat is None:
        return None
    missing = size - len(flat)
    if part.start == missing and part.stop == size:
        return flat
    return flat[part.start - missing : part.stop - missing]
