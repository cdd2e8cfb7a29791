"""Forward and backward of a microbatch as one CUDA graph: a replay costs the host one launch, not thousands.

A small model leaves the GPU idle while Python launches the next kernel. What a forward and its backward launch is the
same for every microbatch: only what is in the tensors differs, and whether a gradient is the first of the step, which
is set, or a later one, which is added. So each of the two is recorded once and replayed. Inputs are copied to where the
recording read them; weights, gradients and their sums have addresses that stay. Nothing of the computation is another:
the kernels are those of the eager step, on the same values.

What Python knows of gradients (`GraphedWeights.progress`) is not in a graph. It is put to what it was after the
recording, with each replay. So recorded microbatches and eager ones go together in one step.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor

from stretto.pipeline_parallel.executor import Executor, Weights, require_scalar
from stretto.pipeline_parallel.inputs import Inputs
from stretto.pipeline_parallel.link import Link
from stretto.pipeline_parallel.stage import Stage
from stretto.schedule import Action, Op, Schedule
from stretto.world import PeerBuffer

TRIES: Final = 3
"""Steps in which a recording may fail, before none is tried any more."""


class GraphedWeights(Weights, Protocol):
    """What a graph asks of data parallelism, besides."""

    def progress(self, stage: int) -> Hashable:
        """Which gradients of this step there are; none is deferred after it."""

    def resume(self, stage: int, progress: Hashable) -> None:
        """It is as it was when `progress` was asked for."""

    def reduces(self, stage: int) -> bool:
        """Whether the gradients of the stage are summed over ranks."""

    def settle(self) -> None:
        """Wait for weights that are on their way."""


class Recorder(Protocol):
    """Makes of what a function launches something that can be launched again."""

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        """Note all that `body` launches, undone; the result does it, whenever it is called."""

    def clear(self) -> None:
        """Forget all."""


class CudaGraphs:
    """Records CUDA graphs, which share their memory: they run one after the other, in the order of their recording.

    `buffers` are those of the axes that recorded collectives may go over.
    """

    def __init__(self, device: torch.device, buffers: Sequence[PeerBuffer] = ()) -> None:
        self._device, self._buffers = device, buffers
        self._stream: torch.cuda.Stream | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        """As `Recorder`. The host waits for the device."""
        self._rewind()
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()  # what eager steps were computed in is needed now
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads may go on with what they do: saves copy, collectives are watched.
            pool = self._graphs[0].pool() if self._graphs else torch.cuda.graph_pool_handle()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                body()
                self._rewind()
            finally:
                for buffer in self._buffers:
                    buffer.restart()
                graph.capture_end()
        self._graphs.append(graph)

        def replay() -> None:
            self._rewind()
            graph.replay()

        return replay

    def clear(self) -> None:
        """As `Recorder`."""
        for graph in self._graphs:
            graph.reset()  # also where who replays it is still there: NCCL waits for the graphs of a group that goes
        self._graphs.clear()

    def _rewind(self) -> None:
        for buffer in self._buffers:
            buffer.rewind()


@dataclass(frozen=True)
class _Recorded:
    """A microbatch, forward and back."""

    replay: Callable[[], object]
    loss: Tensor
    """Where it stands after a replay."""
    after: Hashable
    """Progress of the gradients then."""


class GraphedExecutor(Executor):
    """An executor that replays the microbatches of a program with one stage.

    The first step is eager, since kernels are compiled and chosen in it; the second records. Eager are also those
    of another signature, those whose backward sends gradients to other ranks as it makes them, and everything once
    `TRIES` recordings have failed, which `problem` says then. `agreed` is whether all ranks that compute a microbatch
    together say yes: what failed on one of them is replayed by none.
    """

    weights: GraphedWeights

    def __init__(
        self,
        program: Schedule,
        rank: int,
        stages: Mapping[int, Stage],
        link: Link,
        weights: GraphedWeights,
        recorder: Recorder,
        agreed: Callable[[bool], bool] = bool,
    ) -> None:
        super().__init__(program, rank, stages, link, weights)
        if program.num_stages != 1:
            raise ValueError(f"a program of {program.num_stages} stages: graphs are of microbatches that meet no other")
        self._recorder, self._agreed = recorder, agreed
        self._alone = _alone(program.ranks[rank], sends=weights.reduces(0))
        self._inputs: Inputs | None = None
        self._recorded: dict[Hashable, _Recorded] = {}
        self._replayed: set[int] = set()
        self._steps, self._recording_step = 0, 1
        self.problem = ""
        """Why nothing is recorded any more."""

    @property
    def recorded(self) -> int:
        """Graphs that there are."""
        return len(self._recorded)

    def step(self, microbatches: Sequence[Any]) -> Tensor:
        """As `Executor.step`."""
        self._replayed.clear()
        self.weights.settle()
        loss = super().step(list(microbatches))
        self._steps += 1
        return loss

    def _forward(self, a: Action) -> None:
        found = self._graph(a)
        if found is None:
            super()._forward(a)
            return
        with self.clock.measured(a):
            self.stages[a.stage].replay(found.replay)
        self.weights.resume(a.stage, found.after)
        self._replayed.add(a.mb)
        self._loss = self._loss + found.loss

    def _backward(self, a: Action) -> None:
        if a.mb not in self._replayed:
            super()._backward(a)

    def _graph(self, a: Action) -> _Recorded | None:
        """What does the forward and backward of this microbatch, whose values are where that reads them."""
        if self.problem or self.check_finite or a.mb not in self._alone:
            return None
        given = self._microbatches[a.mb]
        if self._inputs is None:
            self._inputs = Inputs(given)
        elif not self._inputs.put(given):
            return None
        if self._steps == 0:  # what is compiled in it sees the very tensors that will be recorded
            cast("list[Any]", self._microbatches)[a.mb] = self._inputs.tree
            return None
        before = self.weights.progress(a.stage)
        # All in one step: a later recording might take memory in which an earlier graph leaves what a third one reads.
        if before not in self._recorded and self._steps == self._recording_step:
            self._record(a, before, self._inputs.tree)
        return self._recorded.get(before)

    def _record(self, a: Action, before: Hashable, microbatch: Any) -> None:
        stage, made = self.stages[a.stage], list[Any]()

        def body() -> None:
            loss = stage.forward(a.mb, None, microbatch)
            require_scalar(loss)
            stage.backward(a.mb, None)
            made.extend((loss, self.weights.progress(a.stage)))

        problem = ""
        try:
            replay = self._recorder.record(body)
        except Exception as error:  # noqa: BLE001  # whatever it is, the step can be made without
            problem = f"{type(error).__name__}: {error}"
        if self._agreed(not problem):
            self._recorded[before] = _Recorded(replay, *made)
            return
        # Nothing of it was computed, so this microbatch can still be.
        stage.drop(a.mb)
        self.weights.resume(a.stage, before)
        self._recorded.clear()
        self._recorder.clear()
        self._recording_step = self._steps + 1
        if self._recording_step > TRIES:
            self.problem = problem or "a rank of the same tensor-parallel group could not record"
            logging.getLogger(__name__).warning("training without CUDA graphs: %s", self.problem)


def _alone(actions: Iterable[Action], *, sends: bool) -> frozenset[int]:
    """Microbatches whose backward directly follows their forward, and if it `sends`, announces no reduction."""
    computed = [a for a in actions if sends or a.op is not Op.REDUCE]
    return frozenset(a.mb for a, b in pairwise(computed) if (a.op, b.op, b.mb) == (Op.F, Op.B, a.mb))
