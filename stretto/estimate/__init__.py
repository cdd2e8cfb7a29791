"""What a run needs, from its arguments alone: parameters, operations, layers of each stage, memory. Without torch."""

from stretto.estimate.flops import Flops, flops_per_token
from stretto.estimate.memory import Ledger, fitting, fullest, ledger, rank_ledger
from stretto.estimate.parameters import Parameters, count_parameters, norms_of_a_layer, positions, qk_norms
from stretto.estimate.stages import stage_blocks, stage_costs, stage_counts, stage_pieces

__all__ = [
    "Flops",
    "Ledger",
    "Parameters",
    "count_parameters",
    "fitting",
    "flops_per_token",
    "fullest",
    "ledger",
    "norms_of_a_layer",
    "positions",
    "qk_norms",
    "rank_ledger",
    "stage_blocks",
    "stage_costs",
    "stage_counts",
    "stage_pieces",
]
