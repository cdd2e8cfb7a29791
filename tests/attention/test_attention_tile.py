"""Kernels of one tile: what they see, in the words of FlashAttention's windows; forward and back in parts.

Faults to catch: a window of FlashAttention that is one key too wide; a tile that is computed in parts of which one
begins anew.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stretto.attention import Scores
from stretto.attention.tile import Cudnn, Exact, Flash, _sides, cudnn_agrees
from stretto.sequence import Run, Tile, tiles

pytestmark = pytest.mark.gloo


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9), st.integers(1, 9), st.sampled_from([None, 1, 2, 5]))
def test_windows_of_flash_attention_are_the_tiles(q: int, n: int, k: int, m: int, window: int | None) -> None:
    """Its last query stands beside its last key; -1 is no limit. Any two runs of a document, also the same one."""
    for tile in tiles([Run(0, q, n, 0)], [Run(0, k, m, 0)], window):
        rows, columns = tile.shape
        i, j = torch.arange(rows)[:, None], torch.arange(columns)
        left, right = _sides(tile).values()
        beside = i + columns - rows
        theirs = ((j >= beside - left) | (left < 0)) & ((j <= beside + right) | (right < 0))
        ours = (j <= i + tile.offset) & (window is None or j > i + tile.offset - (window or 0))
        assert torch.equal(theirs.expand(rows, columns), ours.expand(rows, columns))


@pytest.mark.parametrize("scores", [Scores(), Scores(softcap=1.0, window=4)])
def test_a_tile_in_parts_is_the_tile(scores: Scores) -> None:
    """As many scores at once as fit, forward and back."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (
        torch.randn(1, h, n, 4, generator=generator, dtype=torch.float64) for h, n in ((4, 9), (2, 7), (2, 7), (4, 9))
    )
    tile = Tile(slice(0, 9), slice(0, 7), 2, scores.window)

    def both() -> list[Tensor]:
        y, lse = Exact().forward(q, k, v, tile, scores)
        return [y, lse, *Exact().backward(dy, q, k, v, y, lse.masked_fill(lse.isinf(), torch.inf), tile, scores)]

    whole = both()
    with mock.patch("stretto.attention.tile._LIMIT", 4 * 7 * 2):
        parts = both()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@given(st.integers(0, 6), st.integers(1, 9), st.sampled_from([None, 3]))
def test_cudnn_is_asked_for_rectangles_and_squares(offset: int, n: int, window: int | None) -> None:
    """Each key that a query sees is in one of the parts, once, and nothing else is."""
    tile = Tile(slice(5, 5 + n), slice(2, 2 + offset + n), offset, window)
    with mock.patch.multiple("stretto.attention.tile", _LEAST=2, _MULTIPLE=2):
        parts = Cudnn(Exact()).parts(tile)
    seen = torch.zeros(n, offset + n, dtype=torch.int64)
    i = torch.arange(n)[:, None]
    for part in parts:
        assert part.query == tile.query
        j = torch.arange(part.shape[1])
        here = (j <= i + part.offset) & (window is None or j > i + part.offset - (window or 0))
        begin = part.key.start - tile.key.start
        seen[:, begin : begin + part.shape[1]] += here
    j = torch.arange(offset + n)
    assert torch.equal(seen, ((j <= i + offset) & (window is None or j > i + offset - (window or 0))).long())
    assert len(parts) == (2 if window is None and offset >= 2 and n >= 2 and offset % 2 == n % 2 == 0 else 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("offset", [0, 1536, 5000])
def test_cudnn_computes_tiles(heads: tuple[int, int], offset: int) -> None:
    """A square along the diagonal, a rectangle, both at once; the adjoint from the LSE over other keys, too."""
    assert cudnn_agrees(torch.device("cuda"))
    n, m = 1024, {0: 1024, 1536: 2560, 5000: 2048}[offset]
    q, dy = (torch.randn(1, heads[0], n, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, heads[1], m, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tile, exact, kernel = Tile(slice(0, n), slice(0, m), offset, None), Exact(), Cudnn(Flash(Exact()))
    y, lse = exact.forward(q, k, v, tile, Scores())
    lse = lse + 0.3  # as if there were more keys
    want = exact.backward(dy, q, k, v, y, lse, tile, Scores())
    dq, dkv = torch.zeros_like(want[0]), [torch.zeros_like(want[1]) for _ in range(2)]
    for part in kernel.parts(tile):
        own = q, k[:, :, part.key], v[:, :, part.key]
        found, of = kernel.forward(*own, part, Scores()), exact.forward(*own, part, Scores())
        for a, b in zip(found, of, strict=True):
            assert (a.float() - b).norm() < 0.01 * b.norm()
        made = kernel.backward(dy, *own, y.to(q.dtype), lse, part, Scores())
        dq += made[0]
        for total, one in zip(dkv, made[1:], strict=True):
            total[:, :, part.key] += one
    for a, b in zip((dq, *dkv), want, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_torch_has_the_kernels_with_these_arguments() -> None:
    """On tensors without memory: shapes in, shapes out; nothing here runs them."""
    q = torch.empty(2, 8, 32, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 2, 48, 64, device="meta", dtype=torch.bfloat16)
    tile = Tile(slice(0, 32), slice(0, 48), 16, None)
    y, lse = Flash(Exact()).forward(q, k, k, tile, Scores())
    assert (y.shape, lse.shape, lse.dtype) == (q.shape, (2, 8, 32), torch.float32)
    assert [x.shape for x in Flash(Exact()).backward(y, q, k, k, y, lse, tile, Scores())] == [q.shape, k.shape, k.shape]
