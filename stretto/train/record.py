"""What a run reports, and who listens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from stretto.reading import reason
from stretto.train.routing_record import RoutingRecord


@dataclass(frozen=True)
class StepRecord:
    """One finished update. `tokens` counts those seen so far, over all ranks.

    What is measured is a mean over the steps since the last line, all of the window when the line is told; what is not
    known is None.
    """

    step: int
    loss: float
    """Nats per token over the global batch."""
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    epoch: float | None = None
    """How often the data was seen."""
    time: str | None = None
    """When it was told: ISO 8601, UTC."""
    ms_per_step: float | None = None
    tokens_per_second_per_gpu: float | None = None
    """Or per rank of a CPU."""
    tflops_per_gpu_full: float | None = None
    """Attention counted over the whole square of the sequence, see `stretto.estimate.Flops`."""
    tflops_per_gpu_causal: float | None = None
    """Attention counted over the half that a causal mask leaves."""
    mfu_full: float | None = None
    """Share of the device's peak, as is the next."""
    mfu_causal: float | None = None
    peak_gib: float | None = None
    """The most memory that any rank had in use so far; on a CPU, resident."""
    reserved_gib: float | None = None
    """The most that torch had taken from a GPU."""
    data_wait_ms: float | None = None
    """Of a step: what this rank's host waited for its rows."""
    packing_waste: float | None = None
    """Share of the rows' slots that holds no token, where rows are packed with whole documents."""
    checkpoint_seconds: float | None = None
    """Spent since the last line, as is the next."""
    evaluation_seconds: float | None = None
    slowest_rank: int | None = None
    """The rank whose own forwards and backwards took longest, see `stretto.train.busy`."""
    fastest_rank: int | None = None
    slowest_over_fastest: float | None = None
    """Their times."""
    skipped_steps: int | None = None
    """Updates that this process has skipped so far, as a gradient was no number; their steps have no row."""
    mtp_losses: Sequence[float] | None = None
    """Nats per token that counts there, of each token after the next one, where the model learns to predict any."""
    expert_load: float | None = None
    """The largest load of an expert over the mean, of the worst layer; see `RoutingRecord`, as for the next ones."""
    expert_entropy: float | None = None
    expert_dropped: float | None = None
    expert_balance: float | None = None
    router_z: float | None = None


HELD_OUT: Final = "held_out"
"""The name of a validation set that has no other."""


@dataclass(frozen=True)
class EvalRecord:
    """Held-out data after `step` updates."""

    step: int
    loss: float
    """Nats per token."""
    bits_per_byte: float | None = None
    """None where the bytes are not known, or the tokenizer loses text, which the model then never sees."""
    seconds: float | None = None
    name: str = HELD_OUT
    """Of the validation set."""


@dataclass(frozen=True)
class SaveRecord:
    """A checkpoint that is whole."""

    step: int
    path: Path
    seconds: float
    """From its beginning to its end."""
    stall: float | None = None
    """Of these, what training waited, as far as that save went."""
    waited: float | None = None
    """Of the stall: until the save before it had ended, of which at most one is under way."""
    copied: float | None = None
    """Until a copy of the state was there; from a GPU, beside the next step."""
    written: float | None = None
    """Rank 0's part, by its writer."""
    nbytes: int | None = None
    """Of rank 0's part."""


@dataclass(frozen=True)
class RunRecord:
    """What is about to run: `steps` in all, of which `after` are done."""

    steps: int
    after: int = 0
    log_every: int = 1
    """A line is told after so many steps."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the run remembers of its configuration."""
    unit: str = "tokens"
    """What `tokens` counts: rows, where nobody said how many tokens a step has."""


class Listener:
    """Is told of a run, on rank 0; nothing in the run depends on it. Override what you want to hear of.

    The order: `started`; `stepped` after each step; `saving` and `saved` around a checkpoint; `evaluated`; `close`,
    however the run ends. All are called from the training loop, which waits for them.
    """

    everywhere = False
    """Whether ranks other than the first tell it, too."""

    def started(self, run: RunRecord) -> None:
        """The first step is about to be made."""

    def stepped(self, record: StepRecord) -> None:
        """An update was made."""

    def routed(self, record: RoutingRecord) -> None:
        """How the update routed its tokens, where the model has experts and a line is told."""

    def evaluated(self, record: EvalRecord) -> None:
        """The model was evaluated."""

    def saving(self, step: int) -> None:
        """A checkpoint is about to be written."""

    def saved(self, record: SaveRecord) -> None:
        """It is whole."""

    def close(self) -> None:
        """The run is over, or has failed."""


class Everyone(Listener):
    """Several listeners as one."""

    everywhere = True

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = tuple(listeners)

    def started(self, run: RunRecord) -> None:
        for each in self.listeners:
            each.started(run)

    def stepped(self, record: StepRecord) -> None:
        for each in self.listeners:
            each.stepped(record)

    def routed(self, record: RoutingRecord) -> None:
        for each in self.listeners:
            each.routed(record)

    def evaluated(self, record: EvalRecord) -> None:
        for each in self.listeners:
            each.evaluated(record)

    def saving(self, step: int) -> None:
        for each in self.listeners:
            each.saving(step)

    def saved(self, record: SaveRecord) -> None:
        for each in self.listeners:
            each.saved(record)

    def close(self) -> None:
        for each in self.listeners:
            each.close()


def figures(record: StepRecord | EvalRecord | SaveRecord) -> dict[str, float]:
    """The numbers of a record by the names that curves are known under; nothing that is not known."""
    names = _SAVE_NAMES if isinstance(record, SaveRecord) else _STEP_NAMES
    if isinstance(record, EvalRecord):
        names = {name: f"{name}/{record.name}" for name in ("loss", "bits_per_byte")}
    found = {name: value for key, name in names.items() if (value := getattr(record, key)) is not None}
    further = (isinstance(record, StepRecord) and record.mtp_losses) or ()
    return found | {f"loss/mtp_{n}": loss for n, loss in enumerate(further, start=1)}


_STEP_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "loss": "loss/train",
        **{name: name for name in ("grad_norm", "lr", "epoch")},
        **{name: name for name in ("tokens_per_second", "tokens_per_second_per_gpu", "ms_per_step", "data_wait_ms")},
        **{name: f"compute/{name}" for name in ("tflops_per_gpu_full", "tflops_per_gpu_causal")},
        **{name: f"compute/{name}" for name in ("mfu_full", "mfu_causal")},
        **{name: f"memory/{name}" for name in ("peak_gib", "reserved_gib")},
        "packing_waste": "data/packing_waste",
        **{name: f"time/{name}" for name in ("checkpoint_seconds", "evaluation_seconds")},
        **{name: f"experts/{name}" for name in ("expert_load", "expert_entropy", "expert_dropped")},
        **{name: f"experts/{name}" for name in ("expert_balance", "router_z")},
        **{name: f"ranks/{name}" for name in ("slowest_rank", "slowest_over_fastest")},
    }
)
_SAVE_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"seconds": "checkpoint/total_seconds"}
    | {name: f"checkpoint/{name}_seconds" for name in ("stall", "waited", "copied", "written")}
    | {"nbytes": "checkpoint/bytes"}
)


class TensorBoard(Listener):
    """The same numbers as TensorBoard scalars, against the step. `last`: the step after which the run goes on."""

    def __init__(self, directory: str | Path, *, last: StepRecord | None = None) -> None:
        if not self.installed():
            raise ModuleNotFoundError("tensorboard is not installed here: pip install 'stretto[tensorboard]'")
        from torch.utils.tensorboard import SummaryWriter  # loads slowly, and only rank 0 writes

        self._lost = False
        # Readers forget what lies in older files from this step on; what is of this very step is said again.
        self._writer: Any = SummaryWriter(str(directory), purge_step=last.step if last else None)
        if last is not None:
            self.stepped(last)

    @staticmethod
    def installed() -> bool:
        """Whether the package is there, an extra of Stretto's."""
        return find_spec("tensorboard") is not None

    def stepped(self, record: StepRecord) -> None:
        self._plot(record)

    def evaluated(self, record: EvalRecord) -> None:
        self._plot(record)

    def saved(self, record: SaveRecord) -> None:
        self._plot(record)

    def _plot(self, record: StepRecord | EvalRecord | SaveRecord) -> None:
        self._try(lambda: [self._writer.add_scalar(*each, record.step) for each in figures(record).items()])

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, write: Callable[[], object]) -> None:
        """The writer's thread ends where the disk is full, and each call after that raises: a run goes on without."""
        if self._lost:
            return
        try:
            write()
        except OSError as error:
            self._lost = True
            logging.getLogger(__name__).warning("no more curves for TensorBoard: %s", reason(error))
