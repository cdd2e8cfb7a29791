"""Kernels of formulas: by torch's compiler (`compiled`), or written by hand, in Triton, where that does not make one
pass over memory or has guards for tensors of many sizes. A call costs the host little more than the launch.

Those by hand stand beside the formulas that they compute, in `hand_written`, and are held against them by one test.
"""

from stretto.kernels.fused import fused
from stretto.kernels.hand_written import hand_written
from stretto.kernels.unguarded import compiled

__all__ = ["compiled", "fused", "hand_written"]
