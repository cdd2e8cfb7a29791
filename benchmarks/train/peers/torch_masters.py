"""fp32 masters, moments and gradients beside bf16 weights for the plain peer, in flat buckets.

Gradients are added to fp32 as autograd finishes them. With more than one data-parallel rank a bucket is scattered
among them in its last backward, each updates its part, and the weights are gathered (ZeRO-1: Rajbhandari et al., 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

ELEMENTS = 1 << 26  # of a bucket: 256 MiB of gradients, where reduce-scatter is near its bandwidth


class Bucket:
    """Flat storage of some parameters; this rank updates the `part` that is its own."""

    def __init__(self, params: Sequence[nn.Parameter], rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        self.group, self.decay = group, params[0].dim() > 1
        self.sharded = isinstance(params[0], DTensor) and any(isinstance(p, Shard) for p in params[0].placements)
        self.params = list(params)
        local = [local_of(p.data) for p in params]
        total = -(-sum(t.numel() for t in local) // (64 * size)) * 64 * size
        self.grads = torch.zeros(total, dtype=torch.float32, device=local[0].device)
        self.spans, at = [], 0
        wide = torch.zeros_like(self.grads)
        for t in local:
            self.spans.append((at, at + t.numel()))
            wide[at : at + t.numel()].copy_(t.flatten())
            at += t.numel()
        self.own = slice(rank * total // size, (rank + 1) * total // size)
        self.master = nn.Parameter(wide[self.own].clone())
        self.master.grad = self.part = self.grads[self.own]
        self.weights: Tensor | None = None
        self.waiting = len(params)
        self.work: dist.Work | None = None

    def narrow(self, dtype: torch.dtype) -> None:
        """Make the parameters views of one vector of `dtype`."""
        self.weights = torch.zeros(self.grads.numel(), dtype=dtype, device=self.grads.device)
        for p, (start, end) in zip(self.params, self.spans, strict=True):
            view = self.weights[start:end].view(p.shape)
            view.copy_(p.data)
            p.data = view

    def publish(self) -> None:
        """Round the masters into the weights, and begin to gather them."""
        if self.weights is None:
            pieces = [self.master.data[a:b] for a, b in self.spans]
            torch._foreach_copy_([local_of(p.data).view(-1) for p in self.params], pieces)
            return
        own = self.weights[self.own]
        own.copy_(self.master.data)
        self.work = None
        if self.group is not None:
            self.work = dist.all_gather_into_tensor(self.weights, own, group=self.group, async_op=True)


class Masters:
    """The optimizer of a model whose weights become `dtype`: AdamW, clipping at 1, one step a call."""

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        lr: float,
        zero: dist.ProcessGroup | None = None,
        spread: dist.ProcessGroup | None = None,
    ) -> None:
        """`zero`: ranks that share the update. `spread`: ranks over which the model itself is cut (tp or pp)."""
        self.zero, self.spread = zero, spread
        rank, size = (dist.get_rank(zero), dist.get_world_size(zero)) if zero is not None else (0, 1)
        self.buckets = [Bucket(params, rank, size, zero) for params in _groups(model)]
        self._narrow(model, dtype)
        self.adam = torch.optim.AdamW(
            [{"params": [b.master], "weight_decay": 0.1 if b.decay else 0.0} for b in self.buckets],
            lr=lr,
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=True,
        )
        self.last = self.first = True
        for bucket in self.buckets:
            for p, span in zip(bucket.params, bucket.spans, strict=True):
                p.register_post_accumulate_grad_hook(self._hook(bucket, span))  # type: ignore[no-untyped-call]

    def _narrow(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Give the model weights of `dtype`; the storage of a DTensor is its own, so those are replaced."""
        before = list(model.parameters())
        if not any(isinstance(p, DTensor) for p in before):
            for bucket in self.buckets:
                bucket.narrow(dtype)
            return
        model.to(dtype)
        new = dict(zip(map(id, before), model.parameters(), strict=True))
        for bucket in self.buckets:
            bucket.params = [new[id(p)] for p in bucket.params]

    def begin(self, *, first: bool, last: bool) -> None:
        """Before a backward: the first of a step writes the gradients, the last sends them."""
        self.first, self.last = first, last
        for bucket in self.buckets:
            bucket.waiting = len(bucket.params)

    def _hook(self, bucket: Bucket, span: tuple[int, int]) -> Callable[[nn.Parameter], None]:
        view = bucket.grads[span[0] : span[1]]

        def arrived(p: nn.Parameter) -> None:
            if p.grad is None:
                return
            grad = p.grad
            if isinstance(grad, DTensor) and isinstance(p, DTensor):
                grad = grad.redistribute(placements=p.placements)  # sums the parts of a norm's gradient
            flat = local_of(grad).flatten()
            view.copy_(flat) if self.first else view.add_(flat)
            p.grad = None
            bucket.waiting -= 1
            if self.last and not bucket.waiting and bucket.group is not None:
                bucket.work = dist.reduce_scatter_tensor(bucket.part, bucket.grads, group=bucket.group, async_op=True)

        return arrived

    def step(self) -> None:
        """Norm, clipping and update, without the host waiting."""
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
        norm = self._norm()
        # The fused kernel divides gradients by this on its way, which saves a pass over them.
        self.adam.grad_scale = (norm + 1e-6).clamp(min=1.0)  # type: ignore[attr-defined]
        self.adam.found_inf = torch.zeros_like(norm)  # type: ignore[attr-defined]
        self.adam.step()
        for bucket in reversed(self.buckets):  # the buckets of the first layers come last, and are needed first
            bucket.publish()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None

    def _norm(self) -> Tensor:
        """L2 norm [] of the whole gradient; what every tp rank holds alike counts once."""
        device = self.buckets[0].grads.device
        cut, whole = (torch.zeros((), device=device) for _ in range(2))
        tensor_parallel = any(isinstance(p, DTensor) for b in self.buckets for p in b.params)
        for bucket, norm in zip(self.buckets, torch._foreach_norm([b.part for b in self.buckets]), strict=True):
            target = whole if tensor_parallel and not bucket.sharded else cut
            target += norm.square()
        for group in (self.zero, self.spread):
            if group is not None:
                dist.all_reduce(cut, group=group)
        return (cut + whole).sqrt()

    def held(self) -> dict[str, list[Tensor]]:
        """By kind, see `Peer.held`."""
        state = [t for per in self.adam.state.values() for t in per.values() if isinstance(t, Tensor)]
        weights = [t for b in self.buckets for t in ([b.weights] if b.weights is not None else map(local_of, b.params))]
        return {
            "weights": [t.detach() for t in weights],
            "gradients": [b.grads for b in self.buckets],
            "optimizer": [*state, *(b.master.data for b in self.buckets)],
        }


def local_of(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return t.to_local() if isinstance(t, DTensor) else t


def _groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters in the order of the backward, cut into buckets that agree on decay and on how they are cut."""
    groups: list[list[nn.Parameter]] = []
    open_: dict[tuple[object, ...], list[nn.Parameter]] = {}
    for p in reversed(list(model.parameters())):
        kind = (p.dim() > 1, str(p.placements) if isinstance(p, DTensor) else "")
        group = open_.get(kind)
        if group is None or sum(q.numel() for q in group) + p.numel() > ELEMENTS:
            group = open_[kind] = []
            groups.append(group)
        group.append(p)
    return groups
