"""P11: an element is a function of seed, name and place, so every slice draws the bits of the whole.

Faults seen red: offsets left out, a chunk that begins again at zero, a shift that keeps the sign, the wrong constant,
a key that ignores the name, one half of the word used for both radius and angle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import stretto.random
from stretto.random import bits, normal_, stream_key

pytestmark = pytest.mark.gloo

WORD = 1 << 64


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as published: a counter that grows by the golden gamma, and its mix (unsigned 64-bit words)."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % WORD
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        found.append(z ^ (z >> 31))
    return found


@given(key=st.integers(-(2**63), 2**63 - 1))
def test_bits_are_splitmix64(key: int) -> None:
    assert [w % WORD for w in bits(key, torch.arange(40)).tolist()] == splitmix64(key % WORD, 40)


def test_bits_of_a_seed_that_others_publish() -> None:
    """The outputs that implementations print for state 1234567."""
    assert [w % WORD for w in bits(1234567, torch.arange(5)).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.data())
def test_every_slice_draws_the_bits_of_the_whole(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), max_size=4), "shape")
    starts = [data.draw(st.integers(0, n)) for n in shape]
    ends = [data.draw(st.integers(start, n)) for start, n in zip(starts, shape, strict=True)]
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    whole = drawn(shape, shape, [0] * len(shape), dtype)
    part = drawn([e - s for s, e in zip(starts, ends, strict=True)], shape, starts, dtype)
    assert torch.equal(part, whole[tuple(slice(s, e) for s, e in zip(starts, ends, strict=True))])


def test_long_slices_draw_the_bits_of_the_whole() -> None:
    """Vectorized and threaded loops end elsewhere in a slice than in the whole; fp64 shows the last bit."""
    whole = drawn([301, 997], [301, 997], [0, 0])
    for rows, columns in ((range(7, 300), range(3, 994)), (range(301), range(500, 501)), (range(150, 151), range(997))):
        part = drawn([len(rows), len(columns)], [301, 997], [rows.start, columns.start])
        assert torch.equal(part, whole[rows.start : rows.stop, columns.start : columns.stop])


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), chunk=st.integers(1, 90))
def test_borders_of_chunks_do_not_matter(rows: int, columns: int, chunk: int) -> None:
    whole = drawn([rows, columns], [20, 20], [3, 4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretto.random, "_CHUNK", chunk)
        assert torch.equal(drawn([rows, columns], [20, 20], [3, 4]), whole)


def test_strides_of_the_target_do_not_matter() -> None:
    wide = torch.full((8, 12), torch.nan, dtype=torch.float64)
    normal_(wide.t()[::3, 1:7], seed=1, name="w", full_shape=(4, 6), offsets=(0, 0), std=0.5)
    assert torch.equal(wide.t()[::3, 1:7], drawn([4, 6], [4, 6], [0, 0]))
    assert wide.isnan().sum() == 8 * 12 - 24, "it wrote outside the view"


def test_a_rectangle_outside_of_the_tensor_is_rejected() -> None:
    """Its indices would be other elements'."""
    with pytest.raises(ValueError, match=r"\[2, 3\] at \[3, 0\] is not inside of \[4, 6\]"):
        drawn([2, 3], [4, 6], [3, 0])
    with pytest.raises(ValueError, match="not inside"):
        drawn([2], [4, 6], [0])


def test_moments() -> None:
    """Of a million deviates, each within five of its standard errors; and the tails of a normal distribution."""
    z = drawn([1000, 1000], [1000, 1000], [0, 0], std=1.0).flatten()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for threshold in (0.5, 1.0, 2.0, 3.0, 4.0):
        share = math.erfc(threshold / math.sqrt(2))
        assert abs((z.abs() > threshold).double().mean() - share) < 5 * math.sqrt(share / n)
    assert z.abs().max() <= 6.8


def test_neighbours_are_independent() -> None:
    """Elements side by side, and tensors whose names or seeds differ by one, have no correlation."""
    z = drawn([100_000], [100_000], [0], std=1.0)
    others = [z.roll(lag) for lag in (1, 2, 8, 64, 1000)]
    others += [drawn([100_000], [100_000], [0], std=1.0, seed=s, name=n) for s, n in ((2, "w"), (1, "v"), (1, "w2"))]
    for other in others:
        assert abs((z * other).mean()) < 5 / math.sqrt(z.numel())
        assert abs((z.square() * other.square()).mean() - 1) < 5 * math.sqrt(8 / z.numel())


@example(a=(1, "2/w"), b=(12, "/w"))
@example(a=(1, "2w"), b=(12, "w"))
@given(a=st.tuples(st.integers(), st.text()), b=st.tuples(st.integers(), st.text()))
def test_seed_and_name_make_a_key_that_collides_with_no_other(a: tuple[int, str], b: tuple[int, str]) -> None:
    """Also where the one ends as the other begins: (1, "2/w") and (12, "/w")."""
    assert (stream_key(*a) == stream_key(*b)) == (a == b)


def drawn(
    shape: Sequence[int],
    full_shape: Sequence[int],
    offsets: Sequence[int],
    dtype: torch.dtype = torch.float64,
    *,
    std: float = 0.5,
    seed: int = 1,
    name: str = "w",
) -> Tensor:
    out = torch.full(tuple(shape), torch.nan, dtype=dtype)
    return normal_(out, seed=seed, name=name, full_shape=full_shape, offsets=offsets, std=std)
