"""From what enters the experts' activation to their tokens: activation, down projection, the way back, the sum.

With y = W_e a + b_e a row's output, a = activation(gate_up), and out = sum over a token's slots of weight times y,

    d a      = weight W_e^T d out        d weight = <d out, y> = <W_e^T d out, a> + <d out, b_e>

so no output of an expert is kept for the weights' gradient: it is made where the experts are, and each row's number
travels back. The gradients of sums travel without the weights for that, and these beside them. Weight gradients
take the weights with a, d W_e = d out^T (weight a), which is the smaller factor. What is kept is gate_up alone: one
pass over it gives weight a, its gradient and d weight.
(Guo et al., "SonicMoE", 2025, keep as little.)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.experts.dispatch import Dispatch
from stretto.experts.grouped import GroupedLinear, Joined, add_bias, of_bias
from stretto.experts.parts import Part
from stretto.tensor_parallel import Pointwise


def give_back(
    gate_up: Tensor, weighed: Tensor, down: GroupedLinear, activation: Pointwise, part: Part, joined: Joined
) -> Tensor:
    """From gate_up [m, 2f or f] of the rows of a part their outputs, which are to go back to the tokens.

    `weighed` stands for the weights of these, or for the outputs of the part before, and what is returned for the
    outputs until `combine`.
    """
    tensors = (gate_up, weighed, down.weight) if down.bias is None else (gate_up, weighed, down.weight, down.bias)
    return _GiveBack.apply(down, activation, part, joined, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def combine(given: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """[n, h]: the sum of each token's outputs, times the weights [n, K], whose gradient goes by `weigh`."""
    return _Combine.apply(given, weights.detach(), dispatch)  # type: ignore[no-any-return, no-untyped-call]


class _GiveBack(Function):
    # The parameters themselves are kept beside what was saved of them: under a checkpoint those are other tensors.

    @staticmethod
    def forward(
        ctx: Any,
        down: GroupedLinear,
        activation: Pointwise,
        part: Part,
        joined: Joined,
        gate_up: Tensor,
        weighed: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        ctx.down, ctx.activation, ctx.part, ctx.joined, segments = down, activation, part, joined, part.segments
        a = activation.forward(gate_up.detach())
        y = down.times(a, weight, segments)
        if bias is not None and down.adds:
            add_bias(y, bias, segments)
        part.keep(y)
        ctx.save_for_backward(gate_up, weight)
        return weighed.new_empty((), dtype=gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        part, down, (gate_up, _weight) = ctx.part, ctx.down, ctx.saved_tensors
        segments, (shares, dy) = part.segments, part.gradients()
        da = down.back(dy, segments)
        a, dgate_up, each = ctx.activation.weighted(da, gate_up, shares)
        if down.bias is not None and down.adds:
            each = each + of_bias(dy.to(shares.dtype), down.bias, segments)
        if ctx.needs_input_grad[5]:  # not of a frozen router
            part.back("numbers", each)
        dweight, dbias = down.add_gradient(dy, a, segments, ctx.joined), None
        if down.bias is not None:
            dbias = down.bias_gradient((dy.to(shares.dtype) * shares).to(dy.dtype), segments)
        grads = (None, None, None, None, dgate_up, shares.new_empty(()), dweight)
        return grads if down.bias is None else (*grads, dbias)


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        del given
        ctx.dispatch = dispatch
        ctx.save_for_backward(weights)
        return dispatch.ops.combine(*dispatch.came("outputs"), weights, dispatch.plan.back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        ctx.dispatch.backward(dout, *ctx.saved_tensors)
        return dout.new_empty(()), None, None
