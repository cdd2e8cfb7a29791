"""Weights and activations cut across the ranks of the tp axis."""

from stretto.tensor_parallel import formulas
from stretto.tensor_parallel.build import Accumulators, Build, unfused
from stretto.tensor_parallel.cross_entropy import HeadLoss, LossTerms, vocab_parallel_cross_entropy
from stretto.tensor_parallel.dropout import Dropout
from stretto.tensor_parallel.layers import (
    ColumnParallelLinear,
    Projection,
    RowParallelLinear,
    declare_norm,
    declare_on,
    replicated,
)
from stretto.tensor_parallel.mappings import (
    copy_to,
    enter,
    gather_sequence,
    leave,
    reduce_from,
    scatter_sequence,
)
from stretto.tensor_parallel.pointwise import Lazy, Pointwise, WithResidual
from stretto.tensor_parallel.vocab import (
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_spec,
)

__all__ = [
    "Accumulators",
    "Build",
    "ColumnParallelLinear",
    "Dropout",
    "HeadLoss",
    "Lazy",
    "LossTerms",
    "Pointwise",
    "Projection",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "WithResidual",
    "copy_to",
    "declare_norm",
    "declare_on",
    "enter",
    "formulas",
    "gather_sequence",
    "leave",
    "reduce_from",
    "replicated",
    "scatter_sequence",
    "unfused",
    "vocab_parallel_cross_entropy",
    "vocab_spec",
]
