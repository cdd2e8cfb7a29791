"""Attention of one rank: which kernels compute it, and how a layer weighs its scores."""

from stretto.attention.dot_product import PLAIN, Attend, Scores, attention_by, causal_attention

__all__ = ["PLAIN", "Attend", "Scores", "attention_by", "causal_attention"]
