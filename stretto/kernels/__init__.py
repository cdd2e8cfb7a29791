"""Kernels written by hand, in Triton, for formulas that a compiler does not make one pass over memory of.

Each stands beside the formula it computes, in `by_hand`, and is held against it by one test for all of them.
"""

from stretto.kernels.by_hand import by_hand

__all__ = ["by_hand"]
