"""Which blocks each pipeline stage holds."""

from __future__ import annotations

from functools import cache
from types import MappingProxyType
from typing import Final

from stretto.arguments.schema import Arguments, ModelConfig
from stretto.estimate.context import LATENCY, NODE
from stretto.estimate.kept import GEMM
from stretto.estimate.parameters import count_parameters, joining
from stretto.estimate.sizes import entering_bytes, local_tokens
from stretto.layout.stages import placement
from stretto.schedule import Cost
from stretto.schedule.blocks import StageBlocks, blocks_of
from stretto.schedule.cut import layers_by_cost
from stretto.schedule.partition import require_counts
from stretto.schedule.pieces import Pieces

_RATES: Final = MappingProxyType({"cuda": (GEMM, NODE, LATENCY), "cpu": (2e10, 1e9, 2.5e-4)})
"""Operations a second; of a message between stages bytes a second, and latency. Those of the CPU are a guess."""


def stage_costs(args: Arguments) -> Cost:
    """How long each stage takes for a microbatch, in forwards of a layer: see `stage_pieces`."""
    return stage_pieces(args).cost(stage_counts(args))


def stage_pieces(args: Arguments) -> Pieces:
    """What a layer, its attention and the head take for a microbatch, in forwards of a layer: by multiplications alone.

    A weight is multiplied once in each of F, I and W. Causal attention multiplies seq_len * heads * head_dim a token
    forward, and 2.5 times that back, for its inputs alone. The head makes its gradients with the loss, in its forward.
    A recomputed block is computed again in the backward. A message takes as long as such a device's would.
    """
    m, count = args.model, count_parameters(args.model, args.batch.seq_len)
    layer, scores = count.active_layer, _scores(m, args.batch.seq_len)
    one, again = layer + scores, args.run.recompute in ("block", "offload")
    f, i, w = 1.0, (layer + 2.5 * scores) / one, layer / one
    here = (count.attention + scores) / one, (count.attention + 2.5 * scores) / one, count.attention / one
    shares = here[0] / f, (here[1] + here[0] * again) / (i + f * again), here[2] / w
    more = m.mtp_layers * (1 + joining(m) / layer)
    head = m.vocab_size * m.hidden * (1 + m.mtp_layers) / one
    rate, wire, latency = _RATES[args.run.device]
    seconds = 2 * one * local_tokens(args) / args.parallel.tp / rate
    hop = (latency + entering_bytes(args) / wire) / seconds
    behind = (3 * head + more * f, more * (i + f * again), more * w)
    cut, barrier = shares if _can_be_cut(m) else None, not args.optimizer.post_validate
    return Pieces((f, i + f * again, w), head=behind, shares=cut, hop=hop, barrier=barrier)


def stage_blocks(args: Arguments) -> tuple[StageBlocks, ...]:
    """The blocks of each stage."""
    return blocks_of(stage_counts(args))


def stage_counts(args: Arguments) -> tuple[float, ...]:
    """How many layers each stage holds: as `parallel.stage_layers` says, else balanced by multiplications.

    The head multiplies by as many weights as a vocabulary of rows has; the embedding only looks rows up and costs
    nothing. What predicts further tokens is on the last stage: for each a layer, what leads into it, and the head once
    more. A block may be cut between its sublayers: see `layers_by_cost`.
    """
    p = args.parallel
    attention, head = _shares(args.model, args.batch.seq_len)
    home = placement(p.pp, p.stages_per_rank, p.shape)
    found = layers_by_cost(args.model.layers, home, attention=attention, head=head)
    if p.stage_layers is None:
        return found
    require_counts(args.model.layers, p.stage_layers, found)
    return p.stage_layers


@cache
def _shares(m: ModelConfig, seq_len: int) -> tuple[float | None, float]:
    """What attention has of a layer's work, where a block can be cut, and the work behind the last layer, in layers."""
    count, scores = count_parameters(m, seq_len), _scores(m, seq_len)
    one = count.active_layer + 3.5 / 3 * scores  # a third of F, I and W
    head = m.vocab_size * m.hidden * (1 + m.mtp_layers) / one + m.mtp_layers * (1 + joining(m) / one)
    return (count.attention + 3.5 / 3 * scores) / one if _can_be_cut(m) else None, head


def _can_be_cut(model: ModelConfig) -> bool:
    """Whether a stage may end between attention and feed-forward: not where both read what enters the block."""
    return not model.parallel_residual


def _scores(model: ModelConfig, seq_len: int) -> float:
    """What a token multiplies for scores and values of a layer's heads, forward: a mean over the layers."""
    windows = [min(seq_len, model.window_of(layer) or seq_len) for layer in range(model.layers)]
    seen = sum(2 * w - w**2 / seq_len for w in windows) / max(len(windows), 1)
    return seen * model.heads * (model.dim_per_head + model.dim_value) / 2
