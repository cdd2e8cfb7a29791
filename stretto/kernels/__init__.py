"""Kernels of formulas: by torch's compiler (`compiled`), or hand-written in Triton where that does not make one pass
over memory or has guards for tensors of many sizes. A call costs the host little more than the launch.

`hand_written` has those beside the formulas that they compute; one test holds each to its own.
"""

from stretto.kernels.fused import fused
from stretto.kernels.hand_written import hand_written
from stretto.kernels.unguarded import compiled

__all__ = ["compiled", "fused", "hand_written"]
