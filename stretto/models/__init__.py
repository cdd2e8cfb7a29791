"""One transformer described by its config, whole or in stages."""

from stretto.models.dot_product import attention_by
from stretto.models.transformer import Microbatch, StageSpec, Transformer

__all__ = ["Microbatch", "StageSpec", "Transformer", "attention_by"]
