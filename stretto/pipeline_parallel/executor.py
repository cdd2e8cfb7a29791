"""One interpreter for every schedule: a table from op to method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from stretto.pipeline_parallel.clock import Clock
from stretto.pipeline_parallel.link import Link
from stretto.pipeline_parallel.meta import Boundary, Parcel, Passed, TensorMeta, metas, tensors
from stretto.pipeline_parallel.stage import Stage
from stretto.schedule import Action, Op, Schedule
from stretto.schedule.actions import WEIGHTS

_ADDING = (Op.B, Op.I)


class Weights(Protocol):
    """What the executor asks of data parallelism."""

    def unshard(self, stage: int) -> None:
        """Make the stage's parameters whole: at once, or on their way until its module is called."""

    def reshard(self, stage: int) -> None:
        """Let go of the stage's whole parameters, if they are sharded."""

    def reduce(self, stage: int) -> None:
        """The next backward of the stage is the step's last: send its buckets as they fill."""


class OwnWeights:
    """Weights of a pipeline without data parallelism: always whole, and their gradients are this rank's."""

    def unshard(self, stage: int) -> None:
        """Nothing to do."""

    def reshard(self, stage: int) -> None:
        """Nothing to do."""

    def reduce(self, stage: int) -> None:
        """Nothing to do."""


class LeftoverError(RuntimeError):
    """The program ended, but something that it made was never used. The message names each."""


class Executor:
    """Runs the actions of pipeline rank `rank` in a lowered program, step after step.

    `stages` are this rank's stages by number. Whoever wants no gradients runs a program of forwards under
    `torch.no_grad()`. Raises ValueError if the stages are not those that the program places here, or if it splits the
    backward of one whose layers cannot.
    """

    def __init__(self, program: Schedule, rank: int, stages: Mapping[int, Stage], link: Link, weights: Weights) -> None:
        here = {stage for stage, holder in enumerate(program.placement) if holder == rank}
        if set(stages) != here:
            raise ValueError(f"pipeline rank {rank} holds stages {sorted(here)}, but was given {sorted(stages)}")
        splits = {a.stage for a in program.ranks[rank] if a.op is Op.W}
        if whole := sorted(s for s in splits if not stages[s].splits):
            raise ValueError(
                f"the program computes weight gradients apart, but no layer of stage {', '.join(map(str, whole))} "
                "leaves any for it: its I would be a whole backward, and its W nothing; give Stage(deferred=) the "
                "queue that its layers use, or take a schedule without W, such as 1f1b"
            )
        self.program = program
        self.rank = rank
        self.stages = stages
        self.link = link
        self.weights = weights
        self.clock = Clock(link.device, rank)
        """Records when computations run, once started."""
        self.check_finite = False
        """Look at what each computation puts out. The host waits for the device each time: to find a fault."""
        self.before_gradients: Callable[[], object] | None = None
        """Called once in each step, before the first action that may add to a gradient."""
        self._last = program.num_stages - 1
        # What enters stage s for microbatch mb stands at (s, mb): activations going down the stages, gradients
        # going up, whether they come from another rank or from a stage here, and also while they wait for the
        # message that takes them away.
        self._activations: dict[tuple[int, int], Parcel] = {}
        self._gradients: dict[tuple[int, int], Parcel] = {}
        self._first_step = True  # in which every message is announced, and the announcement checked
        self._microbatches: Sequence[Any] = ()
        self._loss = torch.zeros((), device=link.device)
        self._run: dict[Op, Callable[[Action], None]] = {
            Op.F: self._forward,
            Op.B: self._backward,
            Op.I: self._backward_input,
            Op.W: self._backward_weight,
            Op.SEND_F: self._send_forward,
            Op.RECV_F: self._recv_forward,
            Op.SEND_B: self._send_backward,
            Op.RECV_B: self._recv_backward,
            Op.UNSHARD: lambda a: weights.unshard(a.stage),
            Op.RESHARD: lambda a: weights.reshard(a.stage),
            Op.REDUCE: lambda a: weights.reduce(a.stage),
        }

    def playing(self, program: Schedule) -> Executor:
        """One that runs another program over the same stages."""
        made = Executor(program, self.rank, self.stages, self.link, self.weights)
        made.check_finite, made.before_gradients = self.check_finite, self.before_gradients
        return made

    def step(self, microbatches: Sequence[Any]) -> Tensor:
        """Run the program once; the microbatches are handed to the modules as they are.

        Returns the detached sum of the losses (in fp32 or wider) on the rank of the last stage, a zero on the
        others. An exception carries a note that names the action. Raises ValueError if there are not as many
        microbatches as the program has or if neighbouring stages disagree on what passes between them,
        LeftoverError if the program does not use all that it makes.
        """
        if len(microbatches) != self.program.num_microbatches:
            raise ValueError(f"{len(microbatches)} microbatches for a program of {self.program.num_microbatches}")
        self._microbatches, self._loss = microbatches, torch.zeros((), device=self.link.device)
        self.clock.step()
        coming = self.before_gradients
        for action in self.program.ranks[self.rank]:
            # A last stage may make gradients, those of its head, in the forward.
            if coming and (action.op in _ADDING or (action.op is Op.F and action.stage == self._last)):
                coming()
                coming = None
            with record_function(str(action)), _Noted(action, self.rank):
                self._run[action.op](action)
        if coming:
            coming()
        self.link.drain()
        self._check_empty()
        self._microbatches, self._first_step = (), False
        return self._loss

    def _forward(self, a: Action) -> None:
        x = None if a.stage == 0 else self._activations.pop((a.stage, a.mb)).wait()
        with self.clock.measured(a):
            y = self.stages[a.stage].forward(a.mb, x, self._microbatches[a.mb])
        if self.check_finite:
            _require_finite("output", y)
        if a.stage < self._last:
            self._activations[a.stage + 1, a.mb] = Parcel.of(y)
        else:
            self._loss = self._loss + require_scalar(y)

    def _backward(self, a: Action) -> None:
        dy = self._take_gradient(a)
        with self.clock.measured(a):
            dx = self.stages[a.stage].backward(a.mb, dy)
        self._pass_on(a, dx)

    def _backward_input(self, a: Action) -> None:
        dy = self._take_gradient(a)
        with self.clock.measured(a):
            dx = self.stages[a.stage].backward_input(a.mb, dy)
        self._pass_on(a, dx)

    def _backward_weight(self, a: Action) -> None:
        with self.clock.measured(a):
            self.stages[a.stage].backward_weight(a.mb)

    def _take_gradient(self, a: Action) -> Passed | None:
        return None if a.stage == self._last else self._gradients.pop((a.stage, a.mb)).wait()

    def _pass_on(self, a: Action, dx: Passed | None) -> None:
        if dx is not None:
            if self.check_finite:
                _require_finite("gradient of the input", dx)
            self._gradients[a.stage - 1, a.mb] = Parcel.of(dx)

    def _send_forward(self, a: Action) -> None:
        self._send(a, self._activations.pop((a.stage + 1, a.mb)))

    def _send_backward(self, a: Action) -> None:
        self._send(a, self._gradients.pop((a.stage - 1, a.mb)))

    def _recv_forward(self, a: Action) -> None:
        boundary = self.stages[a.stage].entering(self._microbatches[a.mb])
        assert boundary is not None, f"{a}: no message enters the first stage"
        self._activations[a.stage, a.mb] = self._recv(a, boundary)

    def _recv_backward(self, a: Action) -> None:
        self._gradients[a.stage, a.mb] = self._recv(a, self.stages[a.stage].output(a.mb))

    def _send(self, a: Action, parcel: Parcel) -> None:
        for part in parcel.parts:
            if self._first_step:
                self.link.announce(TensorMeta.of(part.tensor), self.program.peer(a))
            self.link.send(part.tensor, self.program.peer(a))

    def _recv(self, a: Action, boundary: Boundary) -> Parcel:
        parts = []
        for meta in metas(boundary):
            if self._first_step:
                self.link.expect(meta, self.program.peer(a))
            parts.append(self.link.recv(meta, self.program.peer(a)))
        return Parcel(tuple(parts), isinstance(boundary, TensorMeta))

    def _check_empty(self) -> None:
        left = [
            *(f"the activation of microbatch {mb} for stage {stage}" for stage, mb in self._activations),
            *(f"the gradient of microbatch {mb} for the output of stage {stage}" for stage, mb in self._gradients),
            *(
                f"what stage {stage} keeps of microbatch {mb}, which never went all the way back"
                for stage, held in self.stages.items()
                for mb in held.kept
            ),
        ]
        if left:
            raise LeftoverError(f"left over at the end of the program of rank {self.rank}: {'; '.join(left)}")


def require_scalar(loss: Passed) -> Tensor:
    """What a last stage returned. Raises ValueError where that is no scalar."""
    if not isinstance(loss, Tensor):
        raise ValueError(f"the last stage must return a scalar loss, not {len(loss)} tensors")
    if loss.dim():
        raise ValueError(
            f"the last stage must return a scalar loss, a mean over its rows, not a tensor of shape {list(loss.shape)}"
        )
    return loss


def _require_finite(what: str, passed: Passed) -> None:
    parts = tensors(passed)
    for n, part in enumerate(parts):
        if not part.isfinite().all():
            which = f", tensor {n} of {len(parts)}" if len(parts) > 1 else ""
            raise FloatingPointError(f"NaN or infinity in the {what}{which}")


class _Noted:
    """Adds to an exception which action it came from."""

    def __init__(self, action: Action, rank: int) -> None:
        self.action, self.rank = action, rank

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            a = self.action
            of = "" if a.op in WEIGHTS else f" of microbatch {a.mb}"
            error.add_note(f"in {a}: {a.op}{of} in stage {a.stage}, on pipeline rank {self.rank}")
