"""What a run will need, from its arguments alone: parameters, and how layers are dealt to stages. Without torch."""

from stretto.estimate.parameters import Parameters, count_parameters
from stretto.estimate.stages import stage_costs, stage_layers

__all__ = ["Parameters", "count_parameters", "stage_costs", "stage_layers"]
