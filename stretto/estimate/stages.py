"""Which blocks each pipeline stage holds."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from stretto.arguments.schema import Arguments
from stretto.estimate.context import LATENCY, NODE
from stretto.estimate.kept import GEMM
from stretto.estimate.parameters import count_parameters, joining
from stretto.estimate.sizes import entering_bytes, local_tokens
from stretto.schedule import Cost, partition
from stretto.schedule.blocks import StageBlocks, blocks_of
from stretto.schedule.pieces import Pieces

_RATES: Final = MappingProxyType({"cuda": (GEMM, NODE, LATENCY), "cpu": (2e10, 1e9, 2.5e-4)})
"""Operations a second; of a message between stages bytes a second, and latency. Those of the CPU are a guess."""


def stage_costs(args: Arguments) -> Cost:
    """How long each stage takes for a microbatch, in forwards of a layer: see `stage_pieces`."""
    return stage_pieces(args).cost(stage_counts(args))


def stage_pieces(args: Arguments) -> Pieces:
    """What a layer and the head take for a microbatch, in forwards of a layer: by their multiplications alone.

    A weight is multiplied once in each of F, I and W. Causal attention multiplies seq_len * heads * head_dim a token
    forward, and 2.5 times that back, for its inputs alone. The head makes its gradients with the loss, in its forward.
    A recomputed block has its forward once more in the backward. A message takes as long as such a device's would.
    """
    layer = count_parameters(args.model, args.batch.seq_len).active_layer
    heads = args.model.heads * (args.model.dim_per_head + args.model.dim_value) / 2
    attention = args.batch.seq_len * heads / layer
    more = args.model.mtp_layers * (1 + joining(args.model) / layer)
    head = args.model.vocab_size * args.model.hidden * (1 + args.model.mtp_layers) / layer / (1 + attention)
    f, i, w = 1.0, (1 + 2.5 * attention) / (1 + attention), 1 / (1 + attention)
    recompute = f if args.run.recompute in ("block", "offload") else 0.0
    rate, wire, latency = _RATES[args.run.device]
    seconds = 2 * layer * (1 + attention) * local_tokens(args) / args.parallel.tp / rate
    hop = (latency + entering_bytes(args) / wire) / seconds
    behind = (3 * head + more * f, more * (i + recompute), more * w)
    return Pieces((f, i + recompute, w), head=behind, hop=hop)


def stage_blocks(args: Arguments) -> tuple[StageBlocks, ...]:
    """The blocks of each stage."""
    return blocks_of(stage_counts(args))


def stage_counts(args: Arguments) -> tuple[float, ...]:
    """How many layers each stage holds: as `parallel.stage_layers` says, else balanced by matrix work.

    The head multiplies by as many weights as a vocabulary of rows has, so it costs that many parameters' worth of a
    layer; the embedding only looks rows up and costs nothing. What predicts further tokens is on the last stage: for
    each a layer, what leads into it, and the head once more.
    """
    p = count_parameters(args.model, args.batch.seq_len)
    m = args.model
    head = m.vocab_size * m.hidden * (1 + m.mtp_layers) / p.active_layer
    head += m.mtp_layers * (1 + joining(m) / p.active_layer)
    held = partition(args.model.layers, args.parallel.num_stages, explicit=args.parallel.stage_layers, head=head)
    return tuple(len(each) for each in held)
