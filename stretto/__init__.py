"""Stretto: train large transformer models on many GPUs; the layout never changes the model.

All that a training program needs, loaded when it is first used:

    with stretto.initialize() as world, stretto.ParallelState.build(stretto.Layout.of(dp=world.size), world) as state:
        trainer = stretto.Trainer(model, state, data=batches, loss=F.mse_loss, global_batch=64)
        trainer.fit(1000, [stretto.LiveProgress()])
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from stretto import schedule as schedule
    from stretto import verify as verify
    from stretto.checkpoint import latest_complete as latest_complete
    from stretto.checkpoint import load, save
    from stretto.distributed import DataParallel as DataParallel
    from stretto.distributed import clip_factor as clip_factor
    from stretto.distributed import grad_norm as grad_norm
    from stretto.distributed.replicate import replicate as replicate
    from stretto.initialize import initialize as initialize
    from stretto.launch.local import run_local as run_local
    from stretto.layout import Layout as Layout
    from stretto.parallel_state import ParallelState as ParallelState
    from stretto.params import Init as Init
    from stretto.params import ParamSpec as ParamSpec
    from stretto.params import Shard as Shard
    from stretto.params import declare as declare
    from stretto.report.progress import LiveProgress as LiveProgress
    from stretto.tensor_parallel import ColumnParallelLinear as ColumnParallelLinear
    from stretto.tensor_parallel import RowParallelLinear as RowParallelLinear
    from stretto.tensor_parallel import VocabParallelEmbedding as VocabParallelEmbedding
    from stretto.tensor_parallel import VocabParallelHead as VocabParallelHead
    from stretto.train.assemble import StageSpec as StageSpec
    from stretto.train.learning_rate import LearningRate as LearningRate
    from stretto.train.meter import Work as Work
    from stretto.train.optimizers import AdamW as AdamW
    from stretto.train.record import JsonLines as JsonLines
    from stretto.train.record import Listener as Listener
    from stretto.train.record import TensorBoard as TensorBoard
    from stretto.train.trackers import MLflow as MLflow
    from stretto.train.trackers import WandB as WandB
    from stretto.train.trainer import Outcome as Outcome
    from stretto.train.trainer import Trainer as Trainer
    from stretto.world import World as World

    load_checkpoint, save_checkpoint = load, save

__version__ = "0.1.0"

PUBLIC: Final = MappingProxyType(
    {
        "Layout": "layout",
        "ParallelState": "parallel_state",
        "World": "world",
        "initialize": "initialize",
        "run_local": "launch.local",
        "Trainer": "train.trainer",
        "Outcome": "train.trainer",
        "StageSpec": "train.assemble",
        "AdamW": "train.optimizers",
        "LearningRate": "train.learning_rate",
        "Work": "train.meter",
        "Listener": "train.record",
        "LiveProgress": "report.progress",
        "JsonLines": "train.record",
        "TensorBoard": "train.record",
        "WandB": "train.trackers",
        "MLflow": "train.trackers",
        "declare": "params",
        "replicate": "distributed.replicate",
        "ParamSpec": "params",
        "Shard": "params",
        "Init": "params",
        "ColumnParallelLinear": "tensor_parallel",
        "RowParallelLinear": "tensor_parallel",
        "VocabParallelEmbedding": "tensor_parallel",
        "VocabParallelHead": "tensor_parallel",
        "DataParallel": "distributed",
        "grad_norm": "distributed",
        "clip_factor": "distributed",
        "save_checkpoint": "checkpoint:save",
        "load_checkpoint": "checkpoint:load",
        "latest_complete": "checkpoint",
        "schedule": "",
        "verify": "",
    }
)
"""Every public name, and the module that has it (after a colon under another name); packages of their own last."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'stretto' has no attribute {name!r}")
    if not PUBLIC[name]:
        return import_module(f"stretto.{name}")
    module, _, known_as = PUBLIC[name].partition(":")
    return getattr(import_module(f"stretto.{module}"), known_as or name)


def __dir__() -> list[str]:
    return sorted([*PUBLIC, "__version__"])
