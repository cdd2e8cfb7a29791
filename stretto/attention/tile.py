"""Attention of one tile: a run of queries to a run of keys of the same document, and its adjoint.

Forward gives beside its output the log of each query's sum of exponentials (LSE), by which outputs for other keys are
merged with it; the adjoint takes the LSE over all keys of a query, so the tiles of a query need not know each other
(Dao et al., "FlashAttention", 2022, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from stretto.attention.scores import Scores
from stretto.sequence import Tile

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of q, k and v."""

_LIMIT: Final = 2**26
"""Scores that exist at once."""
_LEAST: Final = 1024
_MULTIPLE: Final = 256
"""Tokens, of what cuDNN is asked for."""


class TileKernel(Protocol):
    """q [b, heads, n, d], k and v [b, kv_heads, m, d] of one tile."""

    def parts(self, tile: Tile) -> Sequence[Tile]:
        """The tiles as which it is computed soonest."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scores: Scores) -> tuple[Tensor, Tensor]:
        """Output [b, heads, n, d], and LSE [b, heads, n] in fp32 or wider."""

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, tile: Tile, scores: Scores
    ) -> Gradients:
        """Of q, k and v, from the gradient of the whole output y, and from the LSE over all keys."""


class Exact:
    """As the definition says it, in fp32 or wider, with any window and softcap; a piece of the queries at a time."""

    def parts(self, tile: Tile) -> Sequence[Tile]:
        """As `TileKernel`."""
        return (tile,)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scores: Scores) -> tuple[Tensor, Tensor]:
        """As `TileKernel`; both wide."""
        out, sums = [], []
        for part, x, _ in self._scores(q, k, tile, scores):
            lse = torch.logsumexp(x, -1)
            # A query that sees no key has minus infinity.
            weights = torch.exp(x - lse.clamp(min=torch.finfo(x.dtype).min)[..., None])
            out.append((weights @ _wide(v).unsqueeze(2)).flatten(1, 2))
            sums.append(lse.flatten(1, 2))
            del part
        return torch.cat(out, 2), torch.cat(sums, 2)

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, tile: Tile, scores: Scores
    ) -> Gradients:
        """As `TileKernel`."""
        keys, values = _wide(k).unsqueeze(2), _wide(v).unsqueeze(2)
        dk, dv, dqs = torch.zeros_like(keys[:, :, 0]), torch.zeros_like(values[:, :, 0]), []
        for part, x, slope in self._scores(q, k, tile, scores):
            dout = _grouped(_wide(dy[:, :, part]), k.shape[1])
            delta = (dout * _grouped(_wide(y[:, :, part]), k.shape[1])).sum(-1, keepdim=True)
            p = torch.exp(x - _grouped(lse[:, :, part, None], k.shape[1]))
            dv += (p.transpose(-1, -2) @ dout).sum(2)
            dx = p * (dout @ values.transpose(-1, -2) - delta)
            if slope is not None:
                dx *= slope
            dx *= _scale(q, scores)
            dqs.append((dx @ keys).flatten(1, 2))
            dk += (dx.transpose(-1, -2) @ _grouped(_wide(q[:, :, part]), k.shape[1])).sum(2)
        return torch.cat(dqs, 2), dk, dv

    def _scores(
        self, q: Tensor, k: Tensor, tile: Tile, scores: Scores
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Of some queries at a time [b, kv_heads, group, n, m], and their slope where they are capped."""
        (b, heads, n, _), m = q.shape, k.shape[2]
        size = max(1, _LIMIT // (b * heads * m))
        at = torch.arange(m, device=q.device)
        for first in range(0, n, size):
            part = slice(first, min(first + size, n))
            x = _grouped(_wide(q[:, :, part]), k.shape[1]) @ _wide(k).unsqueeze(2).transpose(-1, -2)
            x *= _scale(q, scores)
            slope = None
            if scores.softcap is not None:
                bent = torch.tanh(x / scores.softcap)
                x, slope = scores.softcap * bent, 1 - bent.square()
            if not tile.whole:
                behind = torch.arange(part.start, part.stop, device=q.device)[:, None] + tile.offset - at
                seen = behind >= 0 if tile.window is None else (behind >= 0) & (behind < tile.window)
                x = x.masked_fill(~seen, -torch.inf)
            yield part, x, slope


class Flash:
    """The kernels that torch has of FlashAttention 2, which give the LSE; where a tile has a softcap, `otherwise`."""

    def __init__(self, otherwise: TileKernel) -> None:
        self.otherwise = otherwise

    def parts(self, tile: Tile) -> Sequence[Tile]:
        """As `TileKernel`."""
        return (tile,)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scores: Scores) -> tuple[Tensor, Tensor]:
        """As `TileKernel`."""
        if not _flash_takes(q, scores):
            return self.otherwise.forward(q, k, v, tile, scores)
        sizes = (None, None, q.shape[2], k.shape[2], 0.0)
        y, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(x.transpose(1, 2) for x in (q, k, v)), *sizes, False, False, scale=scores.scale, **_sides(tile)
        )
        return y.transpose(1, 2), lse

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, tile: Tile, scores: Scores
    ) -> Gradients:
        """As `TileKernel`."""
        if not _flash_takes(q, scores):
            return self.otherwise.backward(dy, q, k, v, y, lse, tile, scores)
        none = torch.empty(0, device=q.device, dtype=torch.uint64)
        tensors = (x.transpose(1, 2) for x in (dy, q, k, v, y))
        sizes = (None, None, q.shape[2], k.shape[2], 0.0, False)
        found = torch.ops.aten._flash_attention_backward(
            *tensors, lse.contiguous(), *sizes, none, none, scale=scores.scale, **_sides(tile)
        )
        dq, dk, dv = (x.transpose(1, 2) for x in found)
        return dq, dk, dv


class Cudnn:
    """cuDNN's kernels, on Hopper almost twice as fast as `Flash`, for large tiles of sizes that come again.

    They plan each size anew, for milliseconds, so tiles that follow the lengths of documents are left to `otherwise`.
    """

    def __init__(self, otherwise: TileKernel) -> None:
        self.otherwise = otherwise

    def parts(self, tile: Tile) -> Sequence[Tile]:
        """As `TileKernel`: keys that every query sees, and a square along the diagonal."""
        n, m = tile.shape
        square, rest = tile.key.start + tile.offset, self.otherwise.parts(tile)
        if tile.window is not None or not tile.offset > 0 or tile.offset + n != m:
            return rest
        apart = (
            Tile(tile.query, slice(tile.key.start, square), tile.offset, None),
            Tile(tile.query, slice(square, tile.key.stop), 0, None),
        )
        return apart if all(map(_cudnn_shape, apart)) else rest

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scores: Scores) -> tuple[Tensor, Tensor]:
        """As `TileKernel`."""
        if not _cudnn_takes(q, tile, scores):
            return self.otherwise.forward(q, k, v, tile, scores)
        y, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, not tile.whole, False, scale=scores.scale
        )
        return y, lse.reshape(q.shape[:3])

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, tile: Tile, scores: Scores
    ) -> Gradients:
        """As `TileKernel`."""
        if not _cudnn_takes(q, tile, scores):
            return self.otherwise.backward(dy, q, k, v, y, lse, tile, scores)
        none = torch.zeros((), device=q.device, dtype=torch.int64)  # nothing is dropped
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(dy, q, k, v, y, lse.float()[..., None].contiguous(), none, none, None, None, None, *tile.shape),
            *(0.0, not tile.whole),
            scale=scores.scale,
        )
        return dq, dk, dv


def tile_kernel(device: torch.device) -> TileKernel:
    """What computes tiles on a device."""
    if device.type != "cuda":
        return Exact()
    flash = Flash(Exact())
    return Cudnn(flash) if cudnn_agrees(device) else flash


def cudnn_agrees(device: torch.device) -> bool:
    """Whether this build's cuDNN takes grouped keys and gives the LSE as `Flash` does, forward and back."""
    tile, generator = Tile(slice(0, _LEAST), slice(0, _LEAST), 0, None), torch.Generator(device).manual_seed(0)
    q, k, v, dy = (
        torch.randn(1, heads, _LEAST, 64, device=device, dtype=torch.bfloat16, generator=generator)
        for heads in (4, 2, 2, 4)
    )
    flash = Flash(Exact())
    y, lse = flash.forward(q, k, v, tile, Scores())
    want = (y, lse, *flash.backward(dy, q, k, v, y, lse, tile, Scores()))
    try:
        ours = Cudnn(flash)
        found = (*ours.forward(q, k, v, tile, Scores()), *ours.backward(dy, q, k, v, y, lse, tile, Scores()))
    except RuntimeError:
        return False
    return all(
        a.shape == b.shape and (a.float() - b.float()).norm() < 0.02 * b.float().norm()
        for a, b in zip(found, want, strict=True)
    )


def _cudnn_takes(q: Tensor, tile: Tile, scores: Scores) -> bool:
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return fits and scores.softcap is None and _cudnn_shape(tile)


def _cudnn_shape(tile: Tile) -> bool:
    """Large, of sizes that are no accident, and with all keys seen or the causal ones of a square."""
    n, m = tile.shape
    even = min(n, m) >= _LEAST and n % _MULTIPLE == 0 and m % _MULTIPLE == 0
    return even and (tile.whole or (n == m and tile.offset == 0 and tile.window is None))


def _flash_takes(q: Tensor, scores: Scores) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16) and scores.softcap is None and q.shape[-1] % 8 == 0


def _sides(tile: Tile) -> dict[str, Any]:
    """How far a query sees to either side, as these kernels count it: the last query is beside the last key."""
    n, m = tile.shape
    ahead = tile.offset - (m - n)
    if tile.whole:
        return {"window_size_left": -1, "window_size_right": -1}
    return {
        "window_size_left": -1 if tile.window is None else tile.window - 1 - ahead,
        "window_size_right": ahead,
    }


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[b, heads, n, d] -> [b, kv_heads, group, n, d]."""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _scale(q: Tensor, scores: Scores) -> float:
    return float(q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
