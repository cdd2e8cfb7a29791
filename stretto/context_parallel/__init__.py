"""Attention over rows that lie on several ranks of cp, or that have several documents."""

from stretto.context_parallel.attention import Comm, ContextAttention, Way
from stretto.context_parallel.merge import merge_

__all__ = ["Comm", "ContextAttention", "Way", "merge_"]
