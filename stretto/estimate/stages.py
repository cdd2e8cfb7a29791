"""Which layers each pipeline stage holds."""

from __future__ import annotations

from stretto.arguments.pipeline import num_stages
from stretto.arguments.schema import Arguments
from stretto.estimate.parameters import count_parameters
from stretto.schedule import partition


def stage_layers(args: Arguments) -> tuple[range, ...]:
    """Global numbers of the layers of each stage: as `parallel.stage_layers` says, else balanced by matrix work.

    The head multiplies by as many weights as a vocabulary of rows has, so it costs that many parameters' worth of a
    layer; the embedding only looks rows up and costs nothing.
    """
    p = count_parameters(args.model, args.batch.seq_len)
    head = args.model.vocab_size * args.model.hidden / p.layer
    return partition(args.model.layers, num_stages(args.parallel), explicit=args.parallel.stage_layers, head=head)
