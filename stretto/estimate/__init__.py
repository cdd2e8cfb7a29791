"""What a run will need, from its arguments alone: parameters, operations, layers of each stage. Without torch."""

from stretto.estimate.flops import Flops, flops_per_token
from stretto.estimate.parameters import Parameters, count_parameters
from stretto.estimate.stages import stage_layers

__all__ = ["Flops", "Parameters", "count_parameters", "flops_per_token", "stage_layers"]
