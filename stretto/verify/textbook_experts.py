"""What a training step with experts should send beyond that of dense layers, from sizes alone.

Where each token goes is the router's choice, so how many rows leave a rank follows from the data. The textbook has that
of equal loads, (n-1)/n of all rows; a rank sends nothing at least and all of its rows at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stretto.arguments.schema import Arguments, ModelConfig
from stretto.estimate.sizes import crossing, local_tokens, most_crossing
from stretto.layout import Layout
from stretto.models import StageSpec
from stretto.schedule.blocks import StageBlock, StageBlocks
from stretto.train.dtypes import DTYPES
from stretto.world import Axis, ExpertAxes

EXCHANGE = "etp-ep", "all_to_all_rows"


@dataclass(frozen=True)
class Exchanged:
    """The rows of a rank's microbatches that go to experts, and come back: bytes."""

    args: Arguments
    layout: Layout

    @property
    def ranks(self) -> int:
        """That together hold one copy of all experts."""
        return self.layout.size("etp") * self.layout.size("ep")

    def _times(self, part: StageSpec) -> tuple[int, int]:
        """Sparse layers times microbatches on a stage, and forwards of each."""
        m = self.args.model
        sparse = sum(block.feed_forward and m.is_sparse(block.layer) for block in blocks_of(m, part))
        again = self.args.run.recompute in ("block", "offload")
        return sparse * self.args.batch.microbatches(self.layout.size("dp")), 1 + again

    def rows(self, part: StageSpec) -> float:
        """All that goes to experts and comes back, forward and back, what stays on its rank included."""
        return self._crossing(part, crossing(self.args))

    def _crossing(self, part: StageSpec, ranks: float) -> float:
        """Each token to so many ranks; the row of each assignment back."""
        m, (times, forwards) = self.args.model, self._times(part)
        if self.ranks == 1:
            return 0.0
        tokens = -(-local_tokens(self.args) // self.layout.size("tp"))
        item, rows = DTYPES[self.args.run.dtype].itemsize, m.top_k * self.layout.size("etp")
        numbers = 2 * max(4, item) + 4 * forwards  # a row's weight there, and its gradient back; and its token
        return float(times * tokens * ((forwards + 1) * (ranks + rows) * m.hidden * item + rows * numbers))

    def counts(self, part: StageSpec) -> float:
        """How many rows each expert gets, and how many tokens each rank, which all ranks tell all in a forward."""
        times, forwards = self._times(part)
        halves = 1 + self.args.parallel.ep_comm_overlap
        each = self.ranks * (self.args.model.experts // self.layout.size("ep") + 1) * 8
        return float(times * forwards * halves * (self.ranks - 1) * each)

    def sent(self, part: StageSpec) -> dict[tuple[str, str], float]:
        """All of it with equal loads; and where tensor-parallel ranks hold the same tokens, the gathers of what they
        shared among them: outputs forward, gradients of inputs back."""
        t = self.layout.size("tp")
        found = {(EXCHANGE[0], "all_gather"): self.counts(part)}
        found[EXCHANGE] = self.rows(part) * (self.ranks - 1) / self.ranks
        if t > 1 and not self.args.parallel.sequence_parallel:
            times, _ = self._times(part)  # nothing needs the outputs of a forward that is only made once more
            item = DTYPES[self.args.run.dtype].itemsize
            one = -(-local_tokens(self.args) // t) * self.args.model.hidden * item
            found["tp", "all_gather"] = float(times * 2 * (t - 1) * one)
        return found

    def slack(self, part: StageSpec) -> tuple[float, float]:
        """How much less, and how much more, a rank may send than with equal loads."""
        sent = self.rows(part) * (self.ranks - 1) / self.ranks
        return sent, self._crossing(part, most_crossing(self.args)) - sent


def blocks_of(model: ModelConfig, part: StageSpec) -> StageBlocks:
    """Of a stage; on the last one those that predict further tokens, too."""
    return (*part.blocks, *(map(StageBlock, model.further_layers) if part.last else ()))


def require_counted(args: Arguments, layout: Layout) -> None:
    """Raise NotImplementedError for experts of bounded capacity, and for those in fp8 of which ranks cut layers."""
    if not args.model.experts:
        return
    if args.model.expert_capacity:
        raise NotImplementedError("no textbook volumes for experts of bounded capacity yet")
    if args.run.fp8 != "none" and layout.size("tp") * layout.size("etp") > 1:
        raise NotImplementedError("no textbook volumes for the scales of experts in fp8 yet")


def expert_axes_at(layout: Layout, at: Mapping[str, int]) -> ExpertAxes:
    """Where a rank with these coordinates is among the holders of experts, without any group."""
    ep, etp = (Axis(name, at[name], tuple(range(layout.size(name)))) for name in ("ep", "etp"))
    places = tuple((e, t) for e in ep.ranks for t in etp.ranks)
    return ExpertAxes(ep, etp, Axis("etp-ep", places.index((ep.rank, etp.rank)), tuple(range(len(places)))), places)


def balance(args: Arguments) -> float:
    """Bytes of what all ranks add up once a step: counts, dropped ones, chances, biases, z."""
    m = args.model
    return 8.0 * len(m.sparse_layers) * (2 * m.experts + 2 * m.experts + 1) if m.experts else 0.0
