"""What all blocks of a model compute alike between their matrix products, fused once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from stretto.arguments.schema import ModelConfig
from stretto.models.rope import rotate
from stretto.tensor_parallel import Build, Pointwise, pointwise

Pair = tuple[pointwise.Forward, pointwise.Backward]


@dataclass(frozen=True)
class Parts:
    """The operations that the config names.

    `norm`(x, weight[, bias]), `head_norm`(x, weight), `activation`(gate_up), `rotate`(q, k, (cos, sin)).
    """

    norm: Pointwise
    head_norm: Pointwise
    activation: Pointwise
    rotate: Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, config: ModelConfig, build: Build) -> Parts:
        """One of each for a model, so that each is compiled once."""
        rms = _pair(pointwise.rms_norm, pointwise.rms_norm_backward, config.norm_eps)
        layer = _pair(pointwise.layer_norm, pointwise.layer_norm_backward, config.norm_eps)
        swiglu: Pair = pointwise.swiglu, pointwise.swiglu_backward
        gelu: Pair = pointwise.gelu, pointwise.gelu_backward
        return cls(
            Pointwise.of(*(rms if config.norm == "rms" else layer), build),
            Pointwise.of(*rms, build),
            Pointwise.of(*(swiglu if config.activation == "swiglu" else gelu), build),
            build.fuse(rotate),
        )


def _pair(forward: pointwise.Forward, backward: pointwise.Backward, eps: float) -> Pair:
    return partial(forward, eps=eps), partial(backward, eps=eps)
