"""Data parallelism: flat buckets, their sharding and reduction, the gradient's norm, and the optimizer."""

from stretto.distributed.bucket import Bucket
from stretto.distributed.data_parallel import DataParallel
from stretto.distributed.main_gradients import MainGradients
from stretto.distributed.norm import clip_factor, grad_norm
from stretto.distributed.optimizer import AdamW, Optimizer
from stretto.distributed.rules import AdamWRule, LionRule, MuonRule, Rule, SGDRule
from stretto.distributed.shard import shard
from stretto.notation.param_groups import ParamGroup

__all__ = [
    "AdamW",
    "AdamWRule",
    "Bucket",
    "DataParallel",
    "LionRule",
    "MainGradients",
    "MuonRule",
    "Optimizer",
    "ParamGroup",
    "Rule",
    "SGDRule",
    "clip_factor",
    "grad_norm",
    "shard",
]
