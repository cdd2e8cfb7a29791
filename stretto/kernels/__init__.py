"""Kernels written by hand, in Triton, for formulas that a compiler does not make one pass over memory of.

Each stands beside the formula it computes, in `hand_written`, and is held against it by one test for all of them.
"""

from stretto.kernels.hand_written import hand_written

__all__ = ["hand_written"]
