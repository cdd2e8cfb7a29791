"""Random numbers that do not know the layout.

Element i of a named stream is a function of (seed, name, i) alone, so a rank that holds a slice of a tensor draws
exactly the numbers that one process would have put there. The generator is SplitMix64 used by counter (Steele,
Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014): output i for key k is
mix(k + (i + 1) * gamma). All keys share that one orbit, so two long streams might overlap, shifted; a second round
under a second key scatters them. Integer arithmetic wraps alike on every device; the normal deviates are Box-Muller
in fp64, then rounded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements worked on at a time: bounds the fp64 and int64 temporaries to a few 32 MiB


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """Two 64-bit keys for the stream `name` under `seed`; a hash, so that no two names collide by arithmetic."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


def bits(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits for each element of `index` (int64, any shape), as int64; keys broadcast against it."""
    z = (index + 1) * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def normal_(
    out: Tensor, *, seed: int, name: str, full_shape: Sequence[int], offsets: Sequence[int], std: float
) -> Tensor:
    """Fill `out` with its slice of the logical tensor `name`: normal deviates of mean 0.

    `out` is the rectangle of `full_shape` that starts at `offsets`; any strides and floating dtype. Raises ValueError
    where it does not lie inside: an index beyond an edge would be that of another element.
    """
    if not len(out.shape) == len(full_shape) == len(offsets) or any(
        not 0 <= o <= full - n for n, full, o in zip(out.shape, full_shape, offsets, strict=True)
    ):
        raise ValueError(f"{name}: {list(out.shape)} at {list(offsets)} is not inside of {list(full_shape)}")
    if out.numel() == 0:
        return out
    first, second = stream_key(seed, name)
    rows = max(1, _CHUNK // max(1, out[0].numel())) if out.dim() else 1
    for start in range(0, out.shape[0] if out.dim() else 1, rows):
        part = out[start : start + rows] if out.dim() else out
        shifted = [offsets[0] + start, *offsets[1:]] if out.dim() else []
        index = element_index(part.shape, full_shape, shifted, out.device)
        part.copy_(_normal(bits(second, bits(first, index))) * std)
    return out


def dropped(keys: tuple[int, int], samples: Tensor, positions: Tensor, width: int, p: float, first: int = 0) -> Tensor:
    """Which elements [s, b, width] of an activation, from channel `first` on, fall away; each with `chance(p)`; bool.

    A function of the keys of a stream and of the element's place in the whole run alone: the number of its sample
    (`samples` [b] int64), its place in that (`positions` [s] or, by row, [s, b] int64), and its channel. One word
    decides four channels, by 16 bits each: the words are most of the cost.
    """
    row = bits(
        bits(keys[1], bits(keys[0], samples)), positions if positions.dim() > 1 else positions[:, None]
    )  # [s, b]: a key for each token
    begin = first // 4
    words = bits(row[..., None], torch.arange(begin, -(-(first + width) // 4), device=samples.device))
    # An int64 lies in memory with its low bits first, on CPU and GPU: channel 4 i + k reads bits 16 k and up.
    low = first - 4 * begin
    return words.view(torch.int16)[..., low : low + width] < _threshold(p) - (1 << 15)


def chance(p: float) -> float:
    """The multiple of 2^-16, neither 0 nor 1, with which `dropped` really happens."""
    return _threshold(p) / (1 << 16)


def _threshold(p: float) -> int:
    return min(max(round(p * (1 << 16)), 1), (1 << 16) - 1)


def element_index(
    shape: Sequence[int], full_shape: Sequence[int], offsets: Sequence[int], device: torch.device
) -> Tensor:
    """Row-major index in `full_shape` of every element of the rectangle `shape` at `offsets`; int64 of `shape`."""
    index = torch.zeros(tuple(shape), dtype=torch.int64, device=device)
    for dim, (n, offset) in enumerate(zip(shape, offsets, strict=True)):
        stride = math.prod(full_shape[dim + 1 :])
        place = (torch.arange(n, device=device) + offset) * stride
        index += place.view(-1, *[1] * (len(shape) - dim - 1))
    return index


def _normal(words: Tensor) -> Tensor:
    """Box-Muller from one 64-bit word: 32 bits of radius, 32 of angle. |z| <= 6.8."""
    mask = 0xFFFFFFFF
    radius = ((words & mask).double() + 0.5) * 2.0**-32
    angle = (_shift(words, 32)).double() * (2.0**-32 * 2 * math.pi)
    return torch.sqrt(-2 * torch.log(radius)) * torch.cos(angle)


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
