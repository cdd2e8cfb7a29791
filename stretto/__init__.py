"""Stretto: train large transformer models on many GPUs; the layout never changes the model.

All that a training program needs, loaded when it is first used:

    with stretto.initialize() as world, stretto.ParallelState.build(stretto.Layout.of(dp=world.size), world) as state:
        trainer = stretto.Trainer(model, state, data=batches, loss=F.mse_loss, global_batch=64)
        trainer.fit(1000, [stretto.LiveProgress()])
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType

TYPE_CHECKING = False  # `typing` is much to load before a command can answer Ctrl-C
if TYPE_CHECKING:
    from typing import Any, Final

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
        "SGD": "train.optimizers",
        "Lion": "train.optimizers",
        "Muon": "train.optimizers",
        "ParamGroup": "notation.param_groups",
        "LearningRate": "train.learning_rate",
        "Work": "train.meter",
        "Listener": "train.record",
        "RunRecord": "train.record",
        "StepRecord": "train.record",
        "EvalRecord": "train.record",
        "SaveRecord": "train.record",
        "LiveProgress": "report.progress",
        "JsonLines": "train.metrics_file",
        "TensorBoard": "train.record",
        "WandB": "train.trackers",
        "MLflow": "train.trackers",
        "declare": "params",
        "replicate": "distributed.replicate",
        "Dropout": "distributed.dropout",
        "replace_dropout": "distributed.dropout",
        "parallelize": "tensor_parallel.foreign",
        "plan_of": "interop.plans",
        "shard": "distributed.shard",
        "ParamSpec": "params",
        "Shard": "params",
        "Init": "params",
        "ColumnParallelLinear": "tensor_parallel",
        "RowParallelLinear": "tensor_parallel",
        "VocabParallelEmbedding": "tensor_parallel",
        "VocabParallelHead": "tensor_parallel",
        "vocab_spec": "tensor_parallel",
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
