"""One transformer described by its config, whole or in stages."""

from stretto.models.transformer import Microbatch, StagePart, Transformer

__all__ = ["Microbatch", "StagePart", "Transformer"]
