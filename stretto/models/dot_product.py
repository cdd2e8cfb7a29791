"""softmax(q k^T / sqrt(d)) v by the fastest kernel that takes what it is given."""

from __future__ import annotations

from typing import Final

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FASTEST_FIRST: Final = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""On Hopper, in bf16 at a head of 128: cuDNN 530 to 570 TFLOP/s forward, Flash 2 a little over half of it. Those that
cannot take the dtype, the shape or the deterministic mode are passed over."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[b, heads, s, d] of q and [b, kv_heads, s, d] of k and v: each position sees itself and those before it."""
    grouped = q.shape[1] != k.shape[1]
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    with sdpa_kernel(FASTEST_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
