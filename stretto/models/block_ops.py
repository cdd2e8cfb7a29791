"""What all blocks of a model compute alike between their GEMMs, fused once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from stretto.arguments.schema import ModelConfig
from stretto.attention import Attend
from stretto.estimate.kept import NOTHING, Parts
from stretto.models.full_norm import FullNormOps
from stretto.models.head_norm import NormAndRotate
from stretto.models.rope import Rotate
from stretto.tensor_parallel import Build, Pointwise, formulas

_ACTIVATIONS: Final[Mapping[str, formulas.Formula]] = MappingProxyType(
    {
        "swiglu": formulas.SWIGLU,
        "clamped-swiglu": formulas.CLAMPED_SWIGLU,
        "geglu": formulas.GEGLU,
        "geglu-tanh": formulas.GEGLU_TANH,
        "gelu": formulas.GELU,
        "gelu-tanh": formulas.GELU_TANH,
    }
)

LATENT_EPS: Final = 1e-6
"""Of the norms over a latent, whatever norm_eps is: so DeepSeek's code has it."""


@dataclass(frozen=True)
class BlockOps:
    """The operations that the config names.

    `norm`(x, weight[, bias]), `head_norm` and `latent_norm`(x, weight), `activation`(gate_up),
    `attend`(layer)(q, k, v). `norm_and_rotate` stands for `head_norm` and `rotate`, but where slices are to be exact.
    `parts` of the block are recomputed in the backward.
    """

    norm: Pointwise
    head_norm: Pointwise
    full_norm: FullNormOps
    latent_norm: Pointwise
    activation: Pointwise
    rotate: Rotate
    norm_and_rotate: NormAndRotate | None
    attend: Callable[[int], Attend]
    parts: Parts = NOTHING

    @classmethod
    def of(cls, config: ModelConfig, build: Build, attend: Callable[[int], Attend]) -> BlockOps:
        """One of each for a model, so that each is compiled once."""
        rms = formulas.ZERO_CENTERED_RMS_NORM if config.norm_zero_centered else formulas.RMS_NORM
        clamped = config.activation == "clamped-swiglu"
        clamps = {"alpha": config.swiglu_alpha, "limit": config.swiglu_limit} if clamped else {}
        normed = rms if config.norm == "rms" else formulas.LAYER_NORM
        activation, of_head = _ACTIVATIONS[config.activation], rms
        norm_and_rotate = None
        if build.exact is not None:
            normed, of_head = build.exact.by_tokens(normed), build.exact.by_heads(rms)
            activation = build.exact.by_features(activation, 2 if config.gated else 1)
        else:
            norm_and_rotate = NormAndRotate.of(build, eps=config.norm_eps, zero_centered=config.norm_zero_centered)
        return cls(
            Pointwise.of(normed, build, eps=config.norm_eps),
            Pointwise.of(of_head, build, eps=config.norm_eps),
            FullNormOps.of(build, config.norm_eps),
            Pointwise.of(rms, build, eps=LATENT_EPS),
            Pointwise.of(activation, build, **clamps),
            Rotate.of(build),
            norm_and_rotate,
            attend,
        )

    def recomputing(self, parts: Parts) -> BlockOps:
        """The same for a block that recomputes `parts`."""
        return replace(
            self,
            norm=replace(self.norm, recompute=self.norm.recompute or "norms" in parts),
            latent_norm=replace(self.latent_norm, recompute=self.latent_norm.recompute or "norms" in parts),
            activation=replace(self.activation, recompute=self.activation.recompute or "activation" in parts),
            parts=parts,
        )
