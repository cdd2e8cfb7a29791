"""What a run will need, from its arguments alone: parameters, how layers are dealt to stages, memory. Without torch."""

from stretto.estimate.memory import Ledger, fitting, ledger
from stretto.estimate.parameters import Parameters, count_parameters, norms_of_a_layer, positions, qk_norms
from stretto.estimate.stages import stage_layers

__all__ = [
    "Ledger",
    "Parameters",
    "count_parameters",
    "fitting",
    "ledger",
    "norms_of_a_layer",
    "positions",
    "qk_norms",
    "stage_layers",
]
