"""torch's asynchronous tensor parallelism: its compiler cuts a gather and the GEMMs behind it, or a GEMM and the
scatter behind it, into a piece for each rank, whose transfers go through symmetric memory beside the other pieces.

It falls back to plain collectives where it does not find its patterns, and says nothing; so what it found is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.distributed import _symmetric_memory as symmetric
from torch.fx import Graph

from benchmarks.train.peers import RunRejectedError

COUNTED = {
    "fused_all_gather_matmul": "gathers fused with GEMMs",
    "fused_matmul_reduce_scatter": "GEMMs fused with scatters",
    "all_gather_into_tensor": "gathers alone",
    "reduce_scatter_tensor": "scatters alone",
}
"""What operations of compiled blocks are called."""


class Fusions:
    """The compiler's settings, and what came of them."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    @property
    def options(self) -> dict[str, Any]:
        """Of `torch.compile`. With a pass of ours nothing is taken from its caches, so all is counted."""
        return {"_micro_pipeline_tp": True, "post_grad_custom_post_pass": self._count}

    def _count(self, graph: Graph) -> None:
        names = (getattr(node.target, "__name__", "").partition(".")[0] for node in graph.nodes)
        self.found.update(COUNTED[name] for name in names if name in COUNTED)

    def about(self) -> dict[str, int]:
        """Of the graphs so far, forward and backward of a block: 0 of the fused mean that nothing overlaps."""
        return {name: self.found[name] for name in COUNTED.values()}


def use_symmetric_memory(group: str, device: torch.device) -> None:
    """For the group of that name. Raises RunRejectedError where its ranks cannot read each other's memory."""
    if device.type != "cuda":
        raise RunRejectedError("torch-async-tp needs symmetric memory, which is of GPUs")
    try:
        symmetric.enable_symm_mem_for_group(group)
        symmetric.get_symm_mem_workspace(group, min_size=1 << 20)
    except (RuntimeError, AttributeError) as error:
        raise RunRejectedError(f"no symmetric memory: {error}".partition("\n")[0]) from error
