"""Names and full shapes of the logical tensors of a model, as its own modules declare them."""

from __future__ import annotations

import torch

from stretto.arguments.model import ModelConfig
from stretto.arguments.sections import TuningConfig, is_adapter
from stretto.experts.balance import bias_of
from stretto.interop.names import Shapes
from stretto.models import StageSpec, Transformer
from stretto.params import collect
from stretto.tensor_parallel import Build
from stretto.tensor_parallel.lora import Lora, lora_of
from stretto.world import Axis


def logical_shapes(model: ModelConfig, seq_len: int) -> Shapes:
    """Of the whole model; nothing is allocated. `seq_len` counts where the model does not say its positions."""
    return _shapes(model, seq_len, None)


def adapter_shapes(model: ModelConfig, seq_len: int, tuning: TuningConfig) -> Shapes:
    """Of its adapters alone."""
    lora = lora_of(tuning)
    return {} if lora is None else {n: s for n, s in _shapes(model, seq_len, lora).items() if is_adapter(n)}


def _shapes(model: ModelConfig, seq_len: int, lora: Lora | None) -> Shapes:
    alone = Build(Axis.single("tp"), False, torch.float32, "meta", lora=lora)
    whole = Transformer(model, StageSpec.whole(model), alone, seq_len=seq_len)
    shapes = {part.name: part.spec.shape for item in collect(whole) for part in item.logical}
    if model.router_bias:
        shapes |= {bias_of(layer): (model.experts,) for layer in model.sparse_layers}
    return shapes
