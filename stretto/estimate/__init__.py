"""What a run will need, from its arguments alone: parameters, and how layers are dealt to stages. Without torch."""

from stretto.estimate.parameters import Parameters, count_parameters, norms_of_a_layer, positions, qk_norms
from stretto.estimate.stages import stage_layers

__all__ = ["Parameters", "count_parameters", "norms_of_a_layer", "positions", "qk_norms", "stage_layers"]
