"""Cross-entropy over a vocabulary cut along the tensor-parallel axis, of logits or of the head that makes them.

The head's own loss never holds all logits: it takes some rows of tokens at a time and makes their gradient at once
(as in Hsu et al., "Liger Kernel", 2024), since 16,384 tokens by 131,072 words in fp32 are 8 GiB.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.collectives import all_reduce, all_reduce_max
from stretto.tensor_parallel.build import Accumulators, Build, unfused
from stretto.tensor_parallel.linear import accumulate_matmul
from stretto.world import Axis


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, tp: Axis, *, start: int, rows: int) -> Tensor:
    """-log softmax(logits)[label]: logits [s, b, V/t] with `rows` valid ones from entry `start` on, labels [s, b].

    Only three numbers per token cross the axis: the maximum, the sum of exponentials, the label's logit.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels, tp, start, rows)  # type: ignore[no-untyped-call]
    return loss


class HeadLoss:
    """sum over tokens of weight * -log softmax(x W^T)[label], for words `start`..`start + rows` on this rank.

    At most `limit` bytes of logits exist at once (one row of tokens at least). Accumulators get the weight's gradient
    in the forward, so that none waits for the backward: that must begin at the loss itself. Where it begins at a
    multiple of it, the gradient of x is NaN. A weight that wants no gradient gets none.
    With `softcap` c the logits are c tanh(x W^T / c).
    """

    def __init__(
        self, build: Build, start: int, rows: int, limit: int = 2**28, *, softcap: float | None = None
    ) -> None:
        self.tp, self.start, self.rows, self.limit = build.tp, start, rows, limit
        self.accumulators = build.accumulators
        self.statistics = build.fuse(partial(_statistics, cap=softcap) if softcap else _statistics)
        self.gradient = build.fuse(partial(_gradient_, cap=softcap) if softcap else _gradient_)

    def __call__(self, x: Tensor, weight: nn.Parameter, labels: Tensor, weights: Tensor) -> Tensor:
        """[] in fp64: x [s, b, h], weight [V/t, h] (padded), labels [s, b], weights [s, b]."""
        keep = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        loss: Tensor = _HeadLoss.apply(x, weight, labels, weights, self, keep)  # type: ignore[no-untyped-call]
        return loss

    def of(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """-log softmax [..] of logits [.., V/t], and what `gradient` needs besides the logits."""
        return _losses(logits, labels, self.tp, self.start, self.rows, self.statistics)

    def chunk(self, x: Tensor, weight: Tensor) -> int:
        """Rows of the sequence that are taken at a time.

        As many each time, where fewer than twice the pieces do: a shorter last piece makes the compiler take kernels of
        any size for all of them.
        """
        rows = x.shape[0]
        most = max(1, self.limit // (x.shape[1] * weight.shape[0] * x.element_size()))
        pieces = -(-rows // most)
        even = next((n for n in range(pieces, 2 * pieces) if rows % n == 0), pieces)
        return -(-rows // even)


class _HeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, labels: Tensor, weights: Tensor, of: HeadLoss, keep: bool
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep else x
        size = min(of.chunk(x, weight), x.shape[0])
        memory = torch.empty((size * x.shape[1], weight.shape[0]), dtype=x.dtype, device=x.device)

        def through(dw: Tensor, first_microbatch: bool) -> None:
            """All rows, a piece at a time: their loss, and where gradients are kept those, dW added to `dw`."""
            for first in range(0, x.shape[0], size):
                part = slice(first, first + size)
                rows = x[part].flatten(0, 1)
                logits = torch.mm(rows, weight.t(), out=memory[: rows.shape[0]]).view(*x[part].shape[:2], -1)
                valid = logits[..., : of.rows]  # padding takes no part
                loss, known = of.of(valid, labels[part])
                total.add_((loss.double() * weights[part]).sum())
                if keep:
                    of.gradient(valid, *known, weights[part].to(loss.dtype))
                    logits[..., of.rows :].zero_()
                    grad = logits.flatten(0, 1)
                    torch.mm(grad, weight, out=dx[part].flatten(0, 1))
                    if trained:
                        accumulate_matmul(dw, first_microbatch and first == 0, grad, rows)

        trained = keep and weight.requires_grad
        ctx.param, ctx.accumulators = weight, of.accumulators if trained else None
        if trained and of.accumulators is not None:  # no other copy of it waits for the backward
            of.accumulators.add_in_forward(weight, through)
            ctx.save_for_backward(dx)
            return total
        dw = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if trained else weight
        through(dw, True)
        if keep:
            ctx.save_for_backward(dx, *([dw] if trained else []))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        dx, *made = ctx.saved_tensors
        into: Accumulators | None = ctx.accumulators
        if into is None:
            dw = (made[0] * scale.to(made[0].dtype)).to(ctx.param.dtype) if made else None
            return dx * scale.to(dx.dtype), dw, None, None, None, None
        into.complete(ctx.param)
        # The weight's gradient is that of the loss itself. Of a multiple it would be wrong, which must not stay unseen.
        return dx * torch.where(scale == 1, 1.0, torch.nan).to(dx.dtype), None, None, None, None, None


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp: Axis, start: int, rows: int) -> Tensor:
        loss, known = _losses(logits, labels, tp, start, rows, _statistics)
        ctx.save_for_backward(logits, *known)
        return loss

    @staticmethod
    @once_differentiable  # it takes logits and loss for constants
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, local, mine, highest, exps = ctx.saved_tensors
        return _gradient(logits, local, mine, highest, exps, dy), None, None, None, None


def _losses(
    logits: Tensor, labels: Tensor, tp: Axis, start: int, rows: int, statistics: Any = unfused
) -> tuple[Tensor, tuple[Tensor, ...]]:
    local, mine = localise(labels, start, rows)
    top, exps, label = statistics(logits, local, mine)
    highest = all_reduce_max(top, tp)
    # A rank without words has minus infinity for its highest logit and adds nothing.
    exps, label = all_reduce(torch.stack([exps * (top - highest).exp(), label - highest * mine]), tp)
    return exps.log() - label, (local, mine, highest, exps)


def _statistics(logits: Tensor, local: Tensor, mine: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's words, in fp32 or wider: the highest logit, the sum of exponentials below it, the label's."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap is not None:
        wide = cap * torch.tanh(wide / cap)
    if logits.shape[-1] == 0:
        nothing = torch.zeros(logits.shape[:-1], dtype=wide.dtype, device=wide.device)
        return nothing - torch.inf, nothing, nothing
    top = wide.amax(-1)
    exps = (wide - top.clamp(min=torch.finfo(wide.dtype).min).unsqueeze(-1)).exp().sum(-1)
    # Where another rank holds the label this rank's logit may be minus infinity: choose, do not multiply.
    label = torch.where(mine, wide.gather(-1, local.unsqueeze(-1)).squeeze(-1), 0.0)
    return top, exps, label


def _gradient(
    logits: Tensor,
    local: Tensor,
    mine: Tensor,
    highest: Tensor,
    exps: Tensor,
    dy: Tensor,
    cap: float | None = None,
) -> Tensor:
    """(softmax - 1 at the label) * dy, in the dtype of the logits.

    Shifted by the highest and divided by the sum, not shifted by both at once: 10,000 + log 3 has no room in fp32.
    """
    wide = logits.to(exps.dtype)
    if cap is not None:
        bent = torch.tanh(wide / cap)
        wide, dy = cap * bent, dy.unsqueeze(-1) * (1 - bent.square())  # d tanh(x) = 1 - tanh(x)^2
    else:
        dy = dy.unsqueeze(-1)
    words = torch.arange(logits.shape[-1], device=logits.device)
    one = (words == local.unsqueeze(-1)) & mine.unsqueeze(-1)
    softmax = (wide - highest.unsqueeze(-1)).exp() / exps.unsqueeze(-1)
    return ((softmax - one.to(wide.dtype)) * dy).to(logits.dtype)


def _gradient_(
    logits: Tensor,
    local: Tensor,
    mine: Tensor,
    highest: Tensor,
    exps: Tensor,
    dy: Tensor,
    cap: float | None = None,
) -> None:
    """`_gradient` in the place of the logits: two tensors of that size are much."""
    logits.copy_(_gradient(logits, local, mine, highest, exps, dy, cap))


def localise(ids: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each id on this rank (0 where it is another's) and whether it is this rank's."""
    mine = (ids >= start) & (ids < start + rows)
    return (ids - start) * mine, mine
