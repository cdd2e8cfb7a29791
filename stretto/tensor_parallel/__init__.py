"""Weights and activations cut across the ranks of the tp axis."""

from stretto.tensor_parallel.build import Build
from stretto.tensor_parallel.dropout import Dropout
from stretto.tensor_parallel.layers import (
    ColumnParallelLinear,
    Part,
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
from stretto.tensor_parallel.vocab import (
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_cross_entropy,
    vocab_spec,
)

__all__ = [
    "Build",
    "ColumnParallelLinear",
    "Dropout",
    "Part",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "copy_to",
    "declare_norm",
    "declare_on",
    "enter",
    "gather_sequence",
    "leave",
    "reduce_from",
    "replicated",
    "scatter_sequence",
    "vocab_parallel_cross_entropy",
    "vocab_spec",
]
