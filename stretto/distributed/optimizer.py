"""The optimizer: masters (where they lie) times an update rule (how they move).

Each bucket has one long master in fp32 or wider of this rank's own range, whatever the dtype of the parameters and
whatever is sharded. Frozen parameters move by no rule: they are their own masters, in their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stretto.distributed.bucket import Bucket
from stretto.distributed.data_parallel import DataParallel
from stretto.distributed.rules import AdamWRule, Rule
from stretto.params import Slice, fill, slices

Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]


class Optimizer:
    """Masters and the state of a rule, updated in one pass over memory and published to the parameters.

    Where parameters are narrower than fp32 each bucket's shard gets the rounded master with every step; otherwise the
    shard is the master. `fuse` makes one kernel of the update: of AdamW, it reads gradient, master and moments and
    writes the last three and the weights, 30 bytes for a bf16 weight.
    """

    def __init__(self, weights: DataParallel, rule: Rule, *, fuse: Fuse | None = None) -> None:
        self.weights, self.rule = weights, rule
        self.steps = 0
        self.buckets = weights.all_buckets
        self.masters = [
            b.shard if b.frozen or b.shard.dtype == b.grad_dtype else b.shard.to(b.grad_dtype) for b in self.buckets
        ]
        moved = [master[:0] if b.frozen else master for b, master in zip(self.buckets, self.masters, strict=True)]
        self.state = {name: [torch.zeros_like(master) for master in moved] for name in rule.state}
        self._update: Callable[..., None] = rule.update if fuse is None else fuse(rule.update)

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
        known: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
        # The forward uses the last bucket first: what the others need of it is on its way first.
        for n, bucket in reversed(list(enumerate(self.buckets))):
            if bucket.frozen:
                continue
            master = self.masters[n]
            rounded = bucket.shard if bucket.shard is not master else None
            flats = [master, rounded, bucket.grad, *(each[n] for each in self.state.values())]
            for part, decayed in bucket.segments:
                numbers = known.setdefault((decayed, master.dtype), [])
                if not numbers:
                    one = torch.ones((), dtype=master.dtype, device=master.device)
                    numbers += [(one * x).to(one) for x in (factor, *self.rule.numbers(lr, self.steps, decayed))]
                self._update(*(_cut(flat, part) for flat in flats), *numbers, *self.rule.constants)
            bucket.updated()

    def slices(self) -> list[Slice]:
        """This rank's slices of the masters, under `model/`, and of the rule's state under its names: `exp_avg/`."""
        position, weights = self.weights.position(), self.weights
        return [
            piece
            for kind, flats in {"model": self.masters, **self.state}.items()
            for piece in slices(
                [item for item in weights.declared if kind == "model" or item.param.requires_grad],
                lambda p, flats=flats: weights.part(p, self._in(flats)),  # type: ignore[misc]
                position,
                prefix=f"{kind}/",
            )
        ]

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


def _cut(flat: Tensor | None, part: slice) -> Tensor | None:
    """The part of a flat tensor: itself where that is all of it."""
    if flat is None or (part.start == 0 and part.stop == len(flat)):
        return flat
    return flat[part]
