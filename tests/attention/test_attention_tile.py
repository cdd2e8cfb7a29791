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
from stretto.attention.tile import Exact, Flash, _sides
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


def test_torch_has_the_kernels_with_these_arguments() -> None:
    """On tensors without memory: shapes in, shapes out; nothing here runs them."""
    q = torch.empty(2, 8, 32, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 2, 48, 64, device="meta", dtype=torch.bfloat16)
    tile = Tile(slice(0, 32), slice(0, 48), 16, None)
    y, lse = Flash(Exact()).forward(q, k, k, tile, Scores())
    assert (y.shape, lse.shape, lse.dtype) == (q.shape, (2, 8, 32), torch.float32)
    assert [x.shape for x in Flash(Exact()).backward(y, q, k, k, y, lse, tile, Scores())] == [q.shape, k.shape, k.shape]
