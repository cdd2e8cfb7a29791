"""Norms over the hidden dimension, and over the features of one head."""

from __future__ import annotations

from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.params import Init, ParamSpec
from stretto.tensor_parallel import Build, Pointwise, WithResidual, declare_on, replicated

ONES, ZEROS = Init(mean=1.0), Init()


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as `op` says, and a way past it: [s(/t), b, h] -> twice the same.

    Whoever needs no way past takes `output` alone.
    """

    def __init__(self, hidden: int, op: Pointwise, build: Build, *, bias: bool) -> None:
        super().__init__()
        self.op = op
        ones, zeros = (replicated((hidden,), i, sequence_parallel=build.sequence_parallel) for i in (ONES, ZEROS))
        self.weight = declare_on(self, "weight", ones, build)
        self.bias = declare_on(self, "bias", zeros, build) if bias else None

    def forward(self, x: Tensor) -> WithResidual:
        return self.op.with_residual(x, *self.parameters(recurse=False))


class HeadNorm(nn.Module):
    """RMSNorm over the features of one head, as in Qwen3; its weight is shared by all heads.

    Each rank applies it to its own heads, so the gradient of the weight is a part on every tensor-parallel rank.
    """

    def __init__(self, dim: int, op: Pointwise, build: Build) -> None:
        super().__init__()
        self.op = op
        spec = ParamSpec((dim,), ONES, sum_grad=("tp",), weight_decay=False)
        self.weight = declare_on(self, "weight", spec, build)

    def forward(self, x: Tensor) -> Tensor:
        return self.op.now(x, self.weight)


def norm(config: ModelConfig, build: Build, op: Pointwise) -> Norm:
    """The norm that the config names, over the hidden dimension."""
    return Norm(config.hidden, op, build, bias=config.norm != "rms")
