"""From what enters the experts' activation to their tokens: activation, down projection, the way back, the sum.

With y = W_e a + b_e a row's output, a = activation(gate_up), and out = sum over a token's slots of weight times y,

    d a      = weight W_e^T d out        d weight = <d out, y> = <W_e^T d out, a> + <d out, b_e>

so no output of an expert is kept for the weights' gradient: it is made where the experts are, and each row's number
travels back. The gradients of outputs travel without their weights for that, and these beside them. What is kept is
gate_up, and the activation's output where nothing is recomputed.
(Guo et al., "SonicMoE", 2025, keep as little.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.collectives import all_to_all_rows_async
from stretto.experts.dispatch import Plan, gathered_slots, slot
from stretto.experts.grouped import GroupedLinear, add_bias, multiply, of_bias, stacked
from stretto.tensor_parallel import Pointwise


def output(gate_up: Tensor, weights: Tensor, down: GroupedLinear, activation: Pointwise, plan: Plan) -> Tensor:
    """gate_up [m, 2f or f] of the rows of this rank's experts, weights [n, K] of its tokens -> [n, h]."""
    tensors = (gate_up, weights, down.weight) if down.bias is None else (gate_up, weights, down.weight, down.bias)
    return _Output.apply(down, activation, plan, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _Output(Function):
    # The parameters themselves are kept beside what was saved of them: under a checkpoint those are other tensors.

    @staticmethod
    def forward(
        ctx: Any,
        down: GroupedLinear,
        activation: Pointwise,
        plan: Plan,
        gate_up: Tensor,
        weights: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        ctx.down, ctx.activation, ctx.plan = down, activation, plan
        a = activation.forward(gate_up.detach())
        y = multiply(a, stacked(weight, down.experts).transpose(1, 2), plan.segments)
        if bias is not None and down.adds:
            add_bias(y, bias, plan.segments)
        rows = y.index_select(0, plan.restore)
        rows = all_to_all_rows_async(rows, plan.received, plan.sent, plan.exchange).wait()
        ctx.save_for_backward(gate_up, weights, weight, *(() if activation.recompute else (a,)))
        return gathered_slots(rows, plan.back, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan, down, (gate_up, weights, _, *kept) = ctx.plan, ctx.down, ctx.saved_tensors
        tokens = plan.rows // weights.shape[-1]
        coming = all_to_all_rows_async(dout.index_select(0, tokens), plan.sent, plan.received, plan.exchange)
        shares = weights.reshape(-1).index_select(0, plan.rows)[:, None]
        shares = all_to_all_rows_async(shares, plan.sent, plan.received, plan.exchange).wait()
        shares = shares.index_select(0, plan.arrange)
        dy = coming.wait().index_select(0, plan.arrange)
        da = multiply(dy, stacked(down.weight, down.experts), plan.segments)
        wide = da.to(shares.dtype)
        if kept:
            a = kept[0]
            (dgate_up,) = ctx.activation.backward((wide * shares).to(da.dtype), gate_up)
        else:
            a, dgate_up = ctx.activation.both((wide * shares).to(da.dtype), gate_up)
        each = (wide * a).sum(-1, keepdim=True)
        dy_wide = dy.to(shares.dtype)
        if down.bias is not None and down.adds:
            each += of_bias(dy_wide, down.bias, plan.segments)
        back = all_to_all_rows_async(each.index_select(0, plan.restore), plan.received, plan.sent, plan.exchange)
        dy = (dy_wide * shares).to(dy.dtype)
        dweight = down.add_gradient(dy, a, plan.segments)
        dbias = None if down.bias is None else down.bias_gradient(dy, plan.segments)
        returned = back.wait()
        dweights = torch.cat([slot(returned, plan.back, k, shares.dtype) for k in range(weights.shape[-1])], -1)
        grads = (None, None, None, dgate_up, dweights, dweight)
        return grads if down.bias is None else (*grads, dbias)
