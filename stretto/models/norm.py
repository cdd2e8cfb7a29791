"""Norms over the hidden dimension, over the features of one head, and over a latent."""

from __future__ import annotations

from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.autograd import Region, Value
from stretto.params import Init, ParamSpec
from stretto.tensor_parallel import Build, Lazy, Pointwise, WithResidual, declare_on, replicated

ONES, ZEROS = Init(mean=1.0), Init()


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as `op` says, and a way past it: [s(/t), b, h] -> twice the same.

    Whoever needs no way past takes `output` alone, or `now`.
    """

    def __init__(self, hidden: int, op: Pointwise, build: Build, *, bias: bool, init: Init = ONES) -> None:
        super().__init__()
        self.op = op
        first, zeros = (replicated((hidden,), i, sequence_parallel=build.sequence_parallel) for i in (init, ZEROS))
        self.weight = declare_on(self, "weight", first, build)
        self.bias = declare_on(self, "bias", zeros, build) if bias else None

    def forward(self, x: Tensor) -> WithResidual:
        return self.op.with_residual(x, *self._affine)

    def now(self, x: Tensor) -> Tensor:
        """The output alone, as a tensor."""
        return self.op.now(x, *self._affine)

    def record(self, region: Region, x: Value) -> tuple[Value, Value]:
        """The output and the way past it in a region."""
        output, past = self.op.record(region, *self.inputs(region, x))
        return output, past

    def inputs(self, region: Region, x: Value) -> tuple[Value, ...]:
        """What the operation takes there."""
        return (x, *(region.parameter(each) for each in self._affine))

    @property
    def _affine(self) -> tuple[nn.Parameter, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class HeadNorm(nn.Module):
    """RMSNorm over the features of one head, as in Qwen3; its weight is shared by all heads.

    Each rank applies it to its own heads, so the gradient of the weight is a part on every tensor-parallel rank.
    """

    def __init__(self, dim: int, op: Pointwise, build: Build, *, init: Init = ONES) -> None:
        super().__init__()
        self.op = op
        spec = ParamSpec((dim,), init, sum_grad=("tp",), weight_decay=False)
        self.weight = declare_on(self, "weight", spec, build)

    def forward(self, x: Tensor) -> Tensor:
        return self.op.now(x, self.weight)


class LatentNorm(nn.Module):
    """RMSNorm over a latent, which every rank has whole and uses for its own heads: a part of the gradient each."""

    def __init__(self, dim: int, op: Pointwise, build: Build, *, init: Init = ONES) -> None:
        super().__init__()
        self.op, self.dim, self.ranks = op, dim, build.tp.size
        spec = ParamSpec((dim,), init, weight_decay=False, sum_grad=("tp",))
        self.weight = declare_on(self, "weight", spec, build)

    def forward(self, x: Tensor) -> Tensor | Lazy:
        return self.op(x, self.weight)


def norm(config: ModelConfig, build: Build, op: Pointwise) -> Norm:
    """The norm that the config names, over the hidden dimension."""
    return Norm(config.hidden, op, build, bias=config.norm != "rms", init=first_weight(config))


def first_weight(config: ModelConfig) -> Init:
    """Initial weights of an RMSNorm: it begins by multiplying with one."""
    return ZEROS if config.norm_zero_centered else ONES
