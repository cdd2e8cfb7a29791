"""Names and full shapes of the logical tensors of a model, as its own modules declare them."""

from __future__ import annotations

import torch

from stretto.arguments.model import ModelConfig
from stretto.experts.balance import bias_of
from stretto.interop.names import Shapes
from stretto.models import StageSpec, Transformer
from stretto.params import collect
from stretto.tensor_parallel import Build
from stretto.world import Axis


def logical_shapes(model: ModelConfig, seq_len: int) -> Shapes:
    """Of the whole model; nothing is allocated. `seq_len` counts where the model does not say its positions."""
    alone = Build(Axis.single("tp"), False, torch.float32, "meta")
    whole = Transformer(model, StageSpec.whole(model), alone, seq_len=seq_len)
    shapes = {part.name: part.spec.shape for item in collect(whole) for part in item.logical}
    if model.router_bias:
        shapes |= {bias_of(layer): (model.experts,) for layer in model.sparse_layers}
    return shapes
