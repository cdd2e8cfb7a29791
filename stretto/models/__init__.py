"""One transformer described by its config, whole or in stages."""

from stretto.models.cache import KeyValues
from stretto.models.stage_spec import StageSpec
from stretto.models.transformer import Microbatch, Transformer

__all__ = ["KeyValues", "Microbatch", "StageSpec", "Transformer"]
