"""softmax(q k^T / sqrt(d)) v by the fastest kernel that takes what it is given."""

from __future__ import annotations

from typing import Final, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from stretto.attention.scores import PLAIN, Scores
from stretto.attention.windowed import takes_window, windowed_attention
from stretto.structure import Structure

FASTEST_FIRST: Final = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""On Hopper, in bf16 at a head of 128: cuDNN 530 to 570 TFLOP/s forward, Flash 2 a little over half of it. Those that
cannot take the dtype, the shape or the deterministic mode are passed over."""
_ORDER: Final = [int(each) for each in FASTEST_FIRST]  # type: ignore[call-overload]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores = PLAIN,
    structure: Structure | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[b, heads, n, d] of q and [b, kv_heads, s, d] of k and v: each position sees itself and those before it.

    Heads of v may be of another size, which is that of the output's. Queries are of the last n positions: of all of
    them, but where keys of earlier ones were kept. Raises ValueError for rows that are not plain.
    """
    require_plain(structure)
    grouped, n, s = q.shape[1] != k.shape[1], q.shape[2], k.shape[2]
    whole = n == s and (scores.window is None or scores.window >= s)
    if scores.softcap is not None or sinks is not None:
        return _defined_attention(q, k, v, scores, sinks)
    if scores.window is not None and not whole and takes_window(q, k, v):
        return windowed_attention(q, k, v, scores)
    mask = None if whole else _within(n, s, scores.window, q.device)
    if not q.is_cuda:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=grouped
        )
    # As `sdpa_kernel` with priorities does it, which takes 70 microseconds for all that it looks at.
    usual = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order(_ORDER)
    try:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=grouped
        )
    finally:
        torch._C._set_sdp_priority_order(usual)


def require_plain(structure: Structure | None) -> None:
    """Raise ValueError where rows have several documents or lie on several ranks: these kernels know of neither."""
    if structure is not None and not structure.plain:
        raise ValueError(
            "rows of several documents, or cut over several ranks, but this attention sees one document on one rank: "
            "use stretto.context_parallel.ContextAttention"
        )


def _within(n: int, s: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the last n positions [n, 1] attends to which [s]: none after it, and none `window` or more before."""
    at = torch.arange(s, device=device)
    behind = at[s - n :, None] - at
    return (behind >= 0) & (behind < (window or s))


def _defined_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, sinks: Tensor | None) -> Tensor:
    """As the definition says it; no kernel of torch's caps scores. The weights [b, heads, n, s] exist."""
    b, heads, n, d = q.shape
    k, v = (x.unsqueeze(2) for x in (k, v))
    grouped = q.view(b, k.shape[1], -1, n, d)  # queries beside the key/value head that they share
    weights = grouped @ k.mT * (d**-0.5 if scores.scale is None else scores.scale)
    if (cap := scores.softcap) is not None:
        weights = cap * torch.tanh(weights / cap)
    weights = weights.masked_fill(~_within(n, k.shape[3], scores.window, q.device), -torch.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    if sinks is not None:
        column = sinks.view(k.shape[1], -1, 1, 1).expand(b, -1, -1, n, 1)
        weights = torch.cat([weights, column.to(weights.dtype)], -1)
    shares = torch.softmax(weights, -1, dtype=wide).to(q.dtype)
    out: Tensor = shares[..., : k.shape[3]] @ v
    return out.view(b, heads, n, -1)


class Attend(Protocol):
    """As `causal_attention`: who sees whom is said by the rows' structure and by the scores' window.

    `sinks` [heads] are scores of a key that every query sees and that has no value.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores = PLAIN,
        structure: Structure | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


def attention_by(kernels: Literal["torch", "flash4"], *, deterministic: bool = False) -> Attend:
    """Causal attention by the kernels of that name.

    Raises ModuleNotFoundError, with what to install, where a package is not there.
    """
    if kernels == "torch":
        return causal_attention
    from stretto.attention.flash import flash_attention  # only here, since it asks for an optional package

    return flash_attention(deterministic=deterministic)
