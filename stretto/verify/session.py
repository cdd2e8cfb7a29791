"""A run under inspection: one layout, whole tensors in and out, one step at a time.

    with build(args, Layout.of(tp=2, dp=2), world) as session:
        session.load_full(weights)                   # whole tensors under Hugging Face names
        loss, norm = session.step(batch)             # the global batch
        grads = session.full_grads()                 # after reduction, before clipping

Works for any layout in any world, also for several at once in one process; with the layout of one rank and
`World.single()` it is the reference that others are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stretto.arguments.elsewhere import in_layout, validated_in
from stretto.arguments.schema import Arguments
from stretto.batch import Batch
from stretto.data.feed import rows_of
from stretto.distributed.remainder import parted
from stretto.exchange import all_gather_json
from stretto.layout import Layout
from stretto.models import Microbatch
from stretto.parallel_state import ParallelState
from stretto.params import ParamSpec, Slice, slices
from stretto.train.build import Built
from stretto.train.build import build as build_run
from stretto.train.dtypes import DTYPES
from stretto.train.groups import state_of
from stretto.train.stages import sequence_cut
from stretto.train.step import evaluate
from stretto.train.text import counted
from stretto.verify.activations import ActivationObserver, Seen
from stretto.verify.full import CPU, gather_full, load_full, unequal_replicas
from stretto.world import World


class Session:
    """One model in one layout; made by `build`. All ranks call each method together. Whole tensors are on `home`."""

    def __init__(self, args: Arguments, state: ParallelState, built: Built, home: torch.device = CPU) -> None:
        self.args, self.state, self.built, self.home = args, state, built, home
        self.world = state.axis("tp", "cp", "dp", "pp")
        self.dtype = DTYPES[args.run.dtype]
        self.seen = Seen({}, {})
        self._grads: list[Slice] = []

    def load_full(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the weights from whole tensors, unpadded; moments become zero.

        Raises KeyError for missing ones, and for names that the model does not have: with tied embeddings, say,
        `lm_head.weight` is none of its parameters.
        """
        every = self.built.optimizer.slices()  # once: another call lends masters in two parts anew, as they were
        pieces = [piece for piece in every if piece.name.startswith("model/")]
        known = {name for rank in self.from_all(sorted(p.name.removeprefix("model/") for p in pieces)) for name in rank}
        if unknown := sorted(set(tensors) - known):
            raise KeyError(f"the model has no tensor {', '.join(unknown)}")
        load_full(pieces, {f"model/{name}": tensor for name, tensor in tensors.items()})
        for piece in every:
            if not piece.name.startswith("model/"):
                piece.tensor.zero_()
        self.built.optimizer.loaded(0)

    def full_params(self) -> dict[str, Tensor]:
        """Weights (the fp32 masters where parameters are narrower), whole, by Hugging Face name."""
        return weights_in(gather_full(self._weights(), self.world, self.home))

    def full_grads(self) -> dict[str, Tensor]:
        """Gradients of the last step: summed over everything, not clipped; whole."""
        return gather_full(self._grads, self.world, self.home)

    def full_optimizer(self) -> dict[str, Tensor]:
        """First and second moments, whole, as `exp_avg/NAME` and `exp_avg_sq/NAME`."""
        return gather_full(self._moments(), self.world, self.home)

    def full_state(self) -> dict[str, Tensor]:
        """Both at once: weights as `model/NAME`, and the moments."""
        return gather_full(self.built.optimizer.slices(), self.world, self.home)

    def local_params(self) -> list[tuple[str, Tensor, ParamSpec]]:
        """What this rank computes with: logical name, local block, its spec."""
        with self.built.weights.whole():
            return [
                (part.name, part.view(item.param.data).clone(), part.spec)
                for item in self.built.weights.declared
                for part in item.logical
            ]

    def unequal_replicas(self, full: Mapping[str, Tensor] | None = None) -> list[str]:
        """What on this rank is not bitwise what its owner holds: masters, moments, and, rounded from the masters, the
        parameters that it computes with (as `param/NAME`). Empty is right.

        `full` is the `full_state()` where the caller has it already.
        """
        full = self.full_state() if full is None else full
        weights = self.built.weights
        # Masters that lie in weights and remainders are rounded by these, ties away from zero.
        parts = self.args.optimizer.masters == "remainder"
        rounded = {
            f"param/{n}": (parted(t)[0] if parts and t.dtype != self.dtype else t).to(self.dtype)
            for n, t in weights_in(full).items()
        }
        with weights.whole():
            params = slices(weights.declared, lambda p: p.data, weights.position(), prefix="param/")
            return unequal_replicas([*self.built.optimizer.slices(), *params], {**full, **rounded})

    def step(self, batch: Batch, *, observe: bool = False) -> tuple[float, float]:
        """One update from a whole global batch [global_batch, s]: its loss and gradient norm, on every rank.

        With `observe`, `seen` has afterwards what passed through each module.
        """
        stepper, microbatches = self.built.stepper, self.microbatches(batch)
        if observe:
            mine = list(zip(microbatches, self._rows(), strict=True))
            shape = (batch.tokens.shape[0], batch.tokens.shape[1])
            with ActivationObserver(self.built.stages, self.state.axis("tp"), mine, shape) as observer:
                loss = stepper.gradients(microbatches)
            self.seen = observer.gather(self.world)
        else:
            loss = stepper.gradients(microbatches)
        weights = self.built.weights
        trained = [item for item in weights.declared if item.param.requires_grad]
        pieces = slices(trained, lambda p: weights.part(p, lambda bucket: bucket.grad), weights.position())
        self._grads = [replace(piece, tensor=piece.tensor.clone()) for piece in pieces]
        result = stepper.update(loss, self.args.optimizer.lr)
        stepper.settle()
        return result.loss.item(), result.grad_norm.item()

    def evaluate(self, batch: Batch) -> float:
        """The loss of a whole global batch as an evaluation computes it, on every rank; nothing changes."""
        return evaluate(self.built.evaluator, self.microbatches(batch), self.state).item()

    def microbatches(self, batch: Batch) -> list[Microbatch]:
        """This rank's share of a global batch."""
        self._check(batch)
        return counted([batch.rows(rows) for rows in self._rows()], self.state, sequence_cut(self.args, self.state))

    def groups(self) -> dict[str, tuple[int, ...]]:
        """Ranks of this rank's axes, by name, those of one rank left out."""
        axes = [self.state.axis(name) for name in ("tp", "cp", "dp", "pp", "embed")]
        return {axis.name: axis.ranks for axis in axes if axis.size > 1}

    def from_all(self, value: Any) -> list[Any]:
        """What each rank has, in their order, on every rank: what JSON can say, tuples as lists."""
        return all_gather_json(value, self.world)

    def _check(self, batch: Batch) -> None:
        """Raise ValueError where a whole global batch does not fit the run: a rank would look up nothing, or wait."""
        args, vocab = self.args.batch, self.args.model.vocab_size
        if batch.tokens.shape[0] != args.global_batch:
            raise ValueError(f"{batch.tokens.shape[0]} rows for a global batch of {args.global_batch}")
        for name, ids in (("tokens", batch.tokens), ("labels", batch.labels)):
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= vocab:
                raise ValueError(f"{name} has ids from {low} to {high}, but the vocabulary has 0 to {vocab - 1}")

    def _rows(self) -> list[slice]:
        """The rows of a global batch that are this rank's microbatches."""
        dp, batch = self.state.axis("dp"), self.args.batch
        return rows_of(batch.global_batch, dp.rank, dp.size, batch.micro_batch)

    def _weights(self) -> list[Slice]:
        return [s for s in self.built.optimizer.slices() if s.name.startswith("model/")]

    def _moments(self) -> list[Slice]:
        return [s for s in self.built.optimizer.slices() if not s.name.startswith("model/")]


@contextmanager
def build(
    args: Arguments, layout: Layout, world: World, *, draw: bool = True, home: torch.device = CPU
) -> Iterator[Session]:
    """The model of `args` in `layout` on the ranks of `world`, ready to inspect; gone at the end.

    `args.parallel` gives way to the layout; sequence parallelism, schedule and bucket size stay as they are. What
    passes through the modules is looked at, so no microbatch is a CUDA graph. Raises ConfigError where `args` in
    that layout break a rule. Without `draw` weights are zeros, which somebody fills. Whole tensors go to `home`.
    """
    validated_in(args, layout)
    args = in_layout(args, layout)
    args = replace(args, run=replace(args.run, cuda_graphs=False))
    with state_of(args, layout, world) as state:
        built = build_run(args, state, draw=draw)
        try:
            yield Session(args, state, built, home)
        finally:
            built.weights.close()


def random_weights(session: Session, seed: int) -> dict[str, Tensor]:
    """Weights that hide nothing: as initialized, plus noise, on norms and biases too (no zeros, no ones).

    The noise is drawn on the CPU, so it is the same on all ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    full = session.full_params()
    return {
        n: t + 0.05 * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype)
        for n, t in full.items()
    }


def random_batch(args: Arguments, seed: int, *, masked: float = 0.3) -> Batch:
    """A global batch of random tokens with an unequal mask: row i loses more than row i-1, the last row everything.

    Its rows have numbers that no batch of another seed has.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, seq = args.batch.global_batch, args.batch.seq_len
    tokens = torch.randint(args.model.vocab_size, (rows, seq + 1), generator=generator)
    keep = torch.rand(rows, seq, generator=generator) > masked * torch.linspace(0, 2, rows)[:, None]
    keep[-1] = rows == 1
    samples = torch.arange(rows) + rows * seed
    starts = None
    if args.data.packing:  # about four documents in a row; the last token of each predicts nothing
        begins = torch.rand(rows, seq, generator=generator) < 3 / seq
        begins[:, 0] = True
        starts = torch.where(begins, torch.arange(seq), 0).cummax(1).values
        keep[:, :-1] &= ~begins[:, 1:]
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), keep, samples, starts)


def weights_in(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `full_state()`, by their own names."""
    return {name.removeprefix("model/"): t for name, t in full.items() if name.startswith("model/")}
