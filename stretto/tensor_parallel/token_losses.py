"""The loss of each token by itself, from the head, without all logits: for weights that follow from the losses.

`HeadLoss` makes gradients in its forward, so it must know there what each token weighs. Here that comes with the
backward, which makes the logits once more, a piece at a time: one head GEMM more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.tensor_parallel.cross_entropy import HeadLoss
from stretto.tensor_parallel.loss_formulas import counted


def token_losses(x: Tensor, weight: nn.Parameter, labels: Tensor, of: HeadLoss) -> Tensor:
    """[s, b] in fp32 or wider: x [s, b, h], weight [V/t, h] (padded), labels [s, b]; differentiable once."""
    losses: Tensor = _TokenLosses.apply(x, weight, labels, of, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return losses


class _TokenLosses(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, labels: Tensor, of: HeadLoss, trained: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        losses, highest, exps = torch.empty((3, *labels.shape), dtype=wide, device=x.device).unbind()
        places = of.places(weight, labels)
        for part, _, _, logits in of.pieces(x, weight):
            here = [(local[part], mine[part]) for local, mine in places]
            highest[part], exps[part] = of.of(logits, here, labels[part], losses[part], trained=trained)
        ctx.param, ctx.of = weight, of
        ctx.save_for_backward(x, weight, labels, highest, exps)  # the weight for autograd's check of changes
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _, labels, highest, exps = ctx.saved_tensors
        weight, of = ctx.param, ctx.of
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dy, places = counted(dy, labels, of.terms), of.places(weight, labels)

        wide = torch.promote_types(weight.dtype, torch.float32)
        dw = torch.empty_like(weight, dtype=wide) if weight.requires_grad else None
        for part, rows, grads, valid in of.pieces(x, weight.detach()):
            for logits, (local, mine) in zip(valid, places, strict=True):
                of.gradient(logits, local[part], mine[part], highest[part], exps[part], dy[part])
            of.gemms.input_gradient(grads, weight.detach(), dx[part].flatten(0, 1))
            if dw is not None:
                of.gemms.add(dw, part.start == 0, grads, rows)
        if dw is None or of.accumulators is None:
            return dx, None if dw is None else dw.to(weight.dtype), None, None, None
        of.accumulators.add(weight, lambda total, first: total.copy_(dw) if first else total.add_(dw))
        return dx, None, None, None, None
