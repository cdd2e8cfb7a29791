"""Data parallelism: flat buckets, their reduction, the gradient's norm, and the optimizer."""

from stretto.distributed.bucket import Bucket
from stretto.distributed.data_parallel import DataParallel
from stretto.distributed.main_gradients import MainGradients
from stretto.distributed.norm import clip_factor, grad_norm
from stretto.distributed.optimizer import AdamW

__all__ = ["AdamW", "Bucket", "DataParallel", "MainGradients", "clip_factor", "grad_norm"]
