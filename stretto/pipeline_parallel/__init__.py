"""Pipeline parallel: one rank's part of a program, played over its stages.

    stage = Stage(1, module, TensorMeta((512, 4, 768), torch.bfloat16))
    executor = Executor(lower(one_f_one_b(2, 8)), axis.rank, {1: stage}, Link(axis, device), OwnWeights())
    loss = executor.step(microbatches)             # gradients are in the parameters' .grad

`Pipeline` is all of this for modules of one's own.
`Stage` runs a module forward and back and keeps what lies between; `Link` carries tensors between ranks;
`Executor` dispatches the actions of a schedule, which alone says what happens when.
"""

from stretto.pipeline_parallel.clock import Clock, hop_seconds
from stretto.pipeline_parallel.executor import Executor, LeftoverError, OwnWeights, Weights
from stretto.pipeline_parallel.graphs import CudaGraphs, GraphedExecutor, Recorder
from stretto.pipeline_parallel.link import Link
from stretto.pipeline_parallel.meta import TensorMeta
from stretto.pipeline_parallel.own import Pipeline, defer_linear
from stretto.pipeline_parallel.stage import Stage

__all__ = [
    "Clock",
    "CudaGraphs",
    "Executor",
    "GraphedExecutor",
    "LeftoverError",
    "Link",
    "OwnWeights",
    "Pipeline",
    "Recorder",
    "Stage",
    "TensorMeta",
    "Weights",
    "defer_linear",
    "hop_seconds",
]
