"""softmax(q k^T / sqrt(d)) v by the fastest kernel that takes what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

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


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""As `causal_attention`."""


def attention_by(kernels: Literal["torch", "flash4"], *, deterministic: bool = False) -> Attend:
    """Causal attention by the kernels of that name.

    Raises ModuleNotFoundError, with what to install, where a package is not there.
    """
    if kernels == "torch":
        return causal_attention
    from stretto.models.flash import flash_attention  # only here, since it asks for an optional package

    return flash_attention(deterministic=deterministic)
