"""The public names, for type checkers; `__init__.py` loads them."""

from collections.abc import Mapping
from typing import Final

from stretto import schedule as schedule
from stretto import verify as verify
from stretto.checkpoint import latest_complete as latest_complete
from stretto.checkpoint import load as load_checkpoint
from stretto.checkpoint import save as save_checkpoint
from stretto.distributed import DataParallel as DataParallel
from stretto.distributed import clip_factor as clip_factor
from stretto.distributed import grad_norm as grad_norm
from stretto.distributed.dropout import Dropout as Dropout
from stretto.distributed.dropout import replace_dropout as replace_dropout
from stretto.distributed.replicate import replicate as replicate
from stretto.distributed.shard import shard as shard
from stretto.initialize import initialize as initialize
from stretto.interop.plans import plan_of as plan_of
from stretto.launch.local import run_local as run_local
from stretto.layout import Layout as Layout
from stretto.notation.param_groups import ParamGroup as ParamGroup
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
from stretto.tensor_parallel import vocab_spec as vocab_spec
from stretto.tensor_parallel.foreign import parallelize as parallelize
from stretto.train.assemble import StageSpec as StageSpec
from stretto.train.learning_rate import LearningRate as LearningRate
from stretto.train.meter import Work as Work
from stretto.train.metrics_file import JsonLines as JsonLines
from stretto.train.optimizers import SGD as SGD
from stretto.train.optimizers import AdamW as AdamW
from stretto.train.optimizers import Lion as Lion
from stretto.train.optimizers import Muon as Muon
from stretto.train.record import EvalRecord as EvalRecord
from stretto.train.record import Listener as Listener
from stretto.train.record import RunRecord as RunRecord
from stretto.train.record import SaveRecord as SaveRecord
from stretto.train.record import StepRecord as StepRecord
from stretto.train.record import TensorBoard as TensorBoard
from stretto.train.trackers import MLflow as MLflow
from stretto.train.trackers import WandB as WandB
from stretto.train.trainer import Outcome as Outcome
from stretto.train.trainer import Trainer as Trainer
from stretto.world import World as World

__all__ = ["load_checkpoint", "save_checkpoint"]
__version__: Final[str]
PUBLIC: Final[Mapping[str, str]]
