"""Attention of one rank: which kernels compute it, and how a layer weighs its scores."""

from stretto.attention.dot_product import Attend, attention_by, causal_attention
from stretto.attention.scores import PLAIN, Scores

__all__ = ["PLAIN", "Attend", "Scores", "attention_by", "causal_attention"]
