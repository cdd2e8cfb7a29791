"""From what enters the experts' activation to their tokens: activation, down projection, the way back, the sum.

With y = W_e a + b_e a row's output, a = activation(gate_up), and out = sum over a token's slots of weight times y,

    d a      = weight W_e^T d out        d weight = <d out, y> = <W_e^T d out, a> + <d out, b_e>

so no output of an expert is kept for the weights' gradient: it is made where the experts are, and each row's number
travels back. The gradients of outputs travel without their weights for that, and these beside them. Weight gradients
take the weights with a, d W_e = d out^T (weight a), which is the smaller factor. What is kept is gate_up alone: one
pass over it gives weight a, its gradient and d weight.
(Guo et al., "SonicMoE", 2025, keep as little.)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.collectives import all_to_all_rows_async
from stretto.experts.dispatch import Plan, moved
from stretto.experts.grouped import GroupedLinear, add_bias, multiply, of_bias, stacked
from stretto.experts.rows import RowOps, of_slots
from stretto.tensor_parallel import Pointwise


def output(
    gate_up: Tensor, weights: Tensor, down: GroupedLinear, activation: Pointwise, plan: Plan, ops: RowOps
) -> Tensor:
    """gate_up [m, 2f or f] of the rows of this rank's experts, weights [n, K] of its tokens -> [n, h]."""
    tensors = (gate_up, weights, down.weight) if down.bias is None else (gate_up, weights, down.weight, down.bias)
    return _Output.apply(down, activation, plan, ops, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _Output(Function):
    # The parameters themselves are kept beside what was saved of them: under a checkpoint those are other tensors.

    @staticmethod
    def forward(
        ctx: Any,
        down: GroupedLinear,
        activation: Pointwise,
        plan: Plan,
        ops: RowOps,
        gate_up: Tensor,
        weights: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        ctx.down, ctx.activation, ctx.plan, ctx.ops = down, activation, plan, ops
        a = activation.forward(gate_up.detach())
        y = multiply(a, stacked(weight, down.experts).transpose(1, 2), plan.segments)
        if bias is not None and down.adds:
            add_bias(y, bias, plan.segments)
        rows = all_to_all_rows_async(moved(y, plan.restore), plan.received, plan.sent, plan.exchange).wait()
        ctx.save_for_backward(gate_up, weights, weight)
        return ops.combine(rows, weights.detach(), plan.back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan, down, (gate_up, weights, *_) = ctx.plan, ctx.down, ctx.saved_tensors
        rows = ctx.ops.scatter(dout, plan.rows, plan.back)
        coming = all_to_all_rows_async(rows, plan.sent, plan.received, plan.exchange)
        shares = weights.reshape(-1).index_select(0, plan.rows)[:, None]
        shares = all_to_all_rows_async(shares, plan.sent, plan.received, plan.exchange).wait()
        shares = moved(shares, plan.arrange)
        dy = moved(coming.wait(), plan.arrange)
        da = multiply(dy, stacked(down.weight, down.experts), plan.segments)
        a, dgate_up, each = ctx.activation.weighted(da, gate_up, shares)
        if down.bias is not None and down.adds:
            each = each + of_bias(dy.to(shares.dtype), down.bias, plan.segments)
        back = all_to_all_rows_async(moved(each, plan.restore), plan.received, plan.sent, plan.exchange)
        dweight, dbias = down.add_gradient(dy, a, plan.segments), None
        if down.bias is not None:
            dbias = down.bias_gradient((dy.to(shares.dtype) * shares).to(dy.dtype), plan.segments)
        grads = (None, None, None, None, dgate_up, of_slots(back.wait(), plan.back), dweight)
        return grads if down.bias is None else (*grads, dbias)
