"""Norms of heads with rotary embedding, forward and back, each in one pass over queries, keys and values.

Heads have weights of queries or of keys, so a tile has heads of one kind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.head_tiles import halves, place, put, rotated, rotated_back, rows, wide
from stretto.kernels.launches import Launches, cdiv
from stretto.kernels.rms_norm import add_up

_TILE = 4096
"""Numbers of a tile of the forward: of bf16, 8 KiB are read at once by four warps. Their 70 registers a thread leave
room for seven such programs on a multiprocessor."""

_TILE_BACK, _STAGES, _PROGRAMS = 2048, 4, 3
"""Of the backward: numbers of a tile, of each of two or three tensors; tiles in flight or at work; and programs for
each multiprocessor. Measured on an H200 with 16 and 8 heads of 128: two to four stages of three to eight programs lie
between 113 and 144 microseconds, these are the first."""


@triton.jit  # which reads annotations, and knows no types but its own
def _angles(cos, sin, at, steps, inside, half: tl.constexpr):
    """Of the first half of each row: the other has the same."""
    place = at[0] * steps[0] + at[1] * steps[1] + tl.arange(0, half)[None, :]
    return tl.load(cos + place, mask=inside, other=0.0), tl.load(sin + place, mask=inside, other=0.0)


@triton.jit
def _weights(weight, centre, half: tl.constexpr, tall: tl.constexpr):
    """What the halves of a row are multiplied by, for each row: a thread has what it needs from one load."""
    weight += tl.zeros([tall, 1], tl.int32) + tl.arange(0, half)[None, :]
    return centre + tl.load(weight).to(tl.float32), centre + tl.load(weight + half).to(tl.float32)


@triton.jit
def _forward_of(
    tile, x, x_steps, weight, cos, sin, cos_steps, out, tokens, batch, eps, centre,
    heads: tl.constexpr, half: tl.constexpr, tall: tl.constexpr,
):  # fmt: skip
    inside, token, at = place(tile, tokens, batch, heads, tall)
    low, high = wide(halves(rows(x, at, x_steps), inside, half))
    c, z = wide(_angles(cos, sin, at, cos_steps, inside, half))
    w_low, w_high = _weights(weight, centre, half, tall)
    squares = tl.sum(low * low + high * high, 1, keep_dims=True)
    scale = tl.rsqrt(squares / (2 * half) + eps)
    y = rotated((low * scale * w_low, high * scale * w_high), c, z)
    put(out + (token * heads + at[2]) * 2 * half, y, inside, half)


@Launches
@triton.jit
def _forward(
    x, q_weight, k_weight, cos, sin, q, k, tokens, batch, q_tiles, eps, centre, x_s, x_b, x_h, cos_s, cos_b,
    heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr, tall: tl.constexpr,
):  # fmt: skip
    steps, cos_steps, tile = (x_s, x_b, x_h), (cos_s, cos_b), tl.program_id(0)
    if tile < q_tiles:
        _forward_of(
            tile, x, steps, q_weight, cos, sin, cos_steps, q, tokens, batch, eps, centre, heads, half, tall
        )  # fmt: skip
    else:
        tile, x = tile - q_tiles, x + heads * x_h
        _forward_of(
            tile, x, steps, k_weight, cos, sin, cos_steps, k, tokens, batch, eps, centre, kv_heads, half, tall
        )  # fmt: skip


@triton.jit
def _backward_of(
    x, x_steps, weight, dy, dy_steps, dv, dv_steps, cos, sin, cos_steps, dx, shares, tokens, batch, eps, centre,
    first: tl.constexpr, heads: tl.constexpr, every: tl.constexpr, with_dv: tl.constexpr,
    turns: tl.constexpr, half: tl.constexpr, tall: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """A program's tiles of one kind of heads, of which the `first` of `every` are passed over. Gradients of values go
    along with those of keys, of which there are as many."""
    w_low, w_high = _weights(weight, centre, half, tall)
    share_low, share_high = tl.zeros([tall, half], tl.float32), tl.zeros([tall, half], tl.float32)
    x += first * x_steps[2]
    dx += first * 2 * half
    # Tiles to come are on their way to shared memory while this one is computed.
    for turn in tl.range(turns, num_stages=stages):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        inside, token, at = place(tile, tokens, batch, heads, tall)
        low, high = wide(halves(rows(x, at, x_steps), inside, half))
        dy_pair = wide(halves(rows(dy, at, dy_steps), inside, half))
        c, z = wide(_angles(cos, sin, at, cos_steps, inside, half))
        here = dx + (token * every + at[2]) * 2 * half
        if with_dv:
            put(here + heads * 2 * half, halves(rows(dv, at, dv_steps), inside, half), inside, half)
        d_low, d_high = rotated_back(dy_pair, c, z)
        dn_low, dn_high = d_low * w_low, d_high * w_high
        squares = tl.sum(low * low + high * high, 1, keep_dims=True)
        products = tl.sum(dn_low * low + dn_high * high, 1, keep_dims=True)
        scale = tl.rsqrt(squares / (2 * half) + eps)
        low, high, mean = low * scale, high * scale, products * scale / (2 * half)
        put(here, ((dn_low - low * mean) * scale, (dn_high - high * mean) * scale), inside, half)
        share_low += d_low * low
        share_high += d_high * high
    share = shares + tl.program_id(0) * 4 * half + tl.arange(0, half)
    tl.store(share, tl.sum(share_low, 0))
    tl.store(share + half, tl.sum(share_high, 0))


@Launches
@triton.jit
def _backward(
    x, q_weight, k_weight, cos, sin, dq, dk, dv, dx, shares, tokens, batch, eps, centre,
    x_s, x_b, x_h, dq_s, dq_b, dq_h, dk_s, dk_b, dk_h, dv_s, dv_b, dv_h, cos_s, cos_b,
    heads: tl.constexpr, kv_heads: tl.constexpr, q_turns: tl.constexpr, kv_turns: tl.constexpr,
    half: tl.constexpr, tall: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Each program has its part of queries, then of keys and values: none has more to do than another."""
    x_steps, cos_steps, dv_steps = (x_s, x_b, x_h), (cos_s, cos_b), (dv_s, dv_b, dv_h)
    every: tl.constexpr = heads + 2 * kv_heads
    _backward_of(
        x, x_steps, q_weight, dq, (dq_s, dq_b, dq_h), dv, dv_steps, cos, sin, cos_steps, dx, shares,
        tokens, batch, eps, centre, 0, heads, every, False, q_turns, half, tall, stages,
    )  # fmt: skip
    _backward_of(
        x, x_steps, k_weight, dk, (dk_s, dk_b, dk_h), dv, dv_steps, cos, sin, cos_steps, dx, shares + 2 * half,
        tokens, batch, eps, centre, heads, kv_heads, every, True, kv_turns, half, tall, stages,
    )  # fmt: skip


def forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    *,
    eps: float,
    centre: float,
) -> tuple[Tensor, Tensor]:
    """`stretto.models.head_norm.norm_and_rotate` of heads that are rotated whole."""
    s, b, every, d = qkv.shape
    kv_heads = (every - heads) // 2
    q, k = (torch.empty((s, b, n, d), dtype=qkv.dtype, device=qkv.device) for n in (heads, kv_heads))
    tall = max(_TILE // d, 1)
    q_tiles, k_tiles = (cdiv(s * b * n, tall) for n in (heads, kv_heads))
    steps = *qkv.stride()[:3], *_steps(cos)
    sizes = heads, kv_heads, d // 2, tall
    _forward[(q_tiles + k_tiles,)](
        qkv, q_weight, k_weight, cos, sin, q, k, s * b, b, q_tiles, eps, centre, *steps, *sizes, num_warps=4
    )
    return q, k


def backward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    eps: float,
    centre: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`stretto.models.head_norm.norm_and_rotate_backward` of heads that are rotated whole."""
    s, b, every, d = qkv.shape
    heads, kv_heads = dq.shape[2], dk.shape[2]
    processors = _backward.processors(qkv.device)
    tall = max(_TILE_BACK // d, 1)
    programs = min(cdiv(s * b * heads, tall), _PROGRAMS * processors)
    turns = [cdiv(s * b * n, tall * programs) for n in (heads, kv_heads)]
    dx = torch.empty((s, b, every, d), dtype=qkv.dtype, device=qkv.device)
    shares = torch.empty((programs, 2 * d), dtype=torch.float32, device=qkv.device)
    steps = [step for x in (qkv, dq, dk, dv) for step in x.stride()[:3]]
    sizes = heads, kv_heads, *turns, d // 2, tall, _STAGES
    given = qkv, q_weight, k_weight, cos, sin, dq, dk, dv, dx, shares
    _backward[(programs,)](*given, s * b, b, eps, centre, *steps, *_steps(cos), *sizes, num_warps=4)
    dw = torch.empty(2 * d, dtype=q_weight.dtype, device=qkv.device)
    add_up(shares, dw)
    return dx, dw[:d], dw[d:]


def _steps(cos: Tensor) -> tuple[int, int]:
    """From one position to the next, and from one sample to the next where each has positions of its own."""
    return cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0
