"""Rotary frequencies: how fast each pair of a head turns, and how that is stretched for longer contexts.

All in fp64. `turns` of a frequency are those within the positions that a model was first trained with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stretto.arguments.schema import ModelConfig


def plain(dim: int, base: float) -> Tensor:
    """[dim/2]: pair i turns by base^(-2i/dim) per position (Su et al., "RoFormer", 2021)."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def frequencies(config: ModelConfig, seq_len: int, *, windowed: bool) -> tuple[Tensor, float]:
    """Frequencies [dim_rotary/2] of the layers with a window, or of those without; and what multiplies cos and sin."""
    c, dim = config, config.dim_rotary
    if windowed and c.rope_local_base is not None:
        return plain(dim, c.rope_local_base), 1.0
    frequency = plain(dim, c.rope_base)
    if c.rope_scaling == "linear":  # Chen et al., "Extending context window ... via position interpolation", 2023
        return frequency / c.rope_factor, 1.0
    if c.rope_scaling == "none":
        return frequency, 1.0
    original = c.rope_original_positions
    if original is None:
        raise ValueError(f"rope_scaling = {c.rope_scaling} needs rope_original_positions")
    if c.rope_scaling == "dynamic":  # the base grows with the length, so that the slowest pair is stretched whole
        stretch = c.rope_factor * max(seq_len, original) / original - (c.rope_factor - 1)
        if dim == 2:  # one pair, which turns once whatever the base
            return frequency, 1.0
        return plain(dim, c.rope_base * stretch ** (dim / (dim - 2))), 1.0
    turns = original * frequency / (2 * math.pi)
    if c.rope_scaling == "llama3":  # Grattafiori et al., "The Llama 3 herd of models", 2024
        kept = ((turns - c.rope_low_freq) / (c.rope_high_freq - c.rope_low_freq)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / c.rope_factor), 1.0
    if c.rope_scaling == "longrope":  # Ding et al., "LongRoPE", 2024
        factors = c.rope_long_factors if seq_len > original else c.rope_short_factors
        return frequency / torch.tensor(factors, dtype=torch.float64), _longrope_attention(config, original)
    return frequency * _yarn(config, original), _yarn_attention(config)


def _yarn(c: ModelConfig, original: int) -> Tensor:
    """What multiplies each frequency (Peng et al., "YaRN", 2023): a ramp over the numbers of the pairs."""

    def pair(turns: float) -> float:
        """The pair, as a real number, that makes so many turns."""
        return c.dim_rotary * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(c.rope_base))

    low, high = pair(c.rope_beta_fast), pair(c.rope_beta_slow)
    if c.rope_whole_pairs:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.dim_rotary - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(c.dim_rotary // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return stretched / c.rope_factor + (1 - stretched)


def _yarn_attention(c: ModelConfig) -> float:
    """The same source, equation 22: scores grow with the length, on either side by its root."""
    if c.rope_attention_factor is not None:
        return c.rope_attention_factor
    if c.rope_mscale is not None and c.rope_mscale_all is not None:
        return c.yarn_mscale(c.rope_mscale) / c.yarn_mscale(c.rope_mscale_all)
    return c.yarn_mscale()


def _longrope_attention(c: ModelConfig, original: int) -> float:
    """The same, as Phi-3 has it: scores grow with the logarithm of the length."""
    if c.rope_attention_factor is not None:
        return c.rope_attention_factor
    return math.sqrt(1 + math.log(c.rope_factor) / math.log(original)) if c.rope_factor > 1 else 1.0
