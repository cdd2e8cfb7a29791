"""One transformer described by its config, whole or in stages."""

from stretto.models.cache import KeyValues
from stretto.models.dot_product import attention_by
from stretto.models.transformer import Microbatch, StageSpec, Transformer

__all__ = ["KeyValues", "Microbatch", "StageSpec", "Transformer", "attention_by"]
