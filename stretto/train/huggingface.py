"""A Hugging Face model at both ends of a run: the weights that it begins with, and the directory that it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stretto.arguments import Arguments
from stretto.arguments.sections import is_adapter
from stretto.interop.adapter_in import begun_with, load_adapter, require_adapter
from stretto.interop.config import read_config
from stretto.interop.export import SHARD, copy_beside, export, ordered, require_empty, tensors
from stretto.interop.live import Live
from stretto.interop.load import load_weights, require_weights
from stretto.interop.outgoing import Outgoing
from stretto.interop.shapes import adapter_shapes, logical_shapes
from stretto.train.build import Built


def require_init(args: Arguments) -> None:
    """Raise InteropError where the Hugging Face model to begin with does not fit. No collective."""
    directory, adapter = begun_with(args.checkpoint.init_from or "")
    config = read_config(directory).predicting(args.model.mtp_layers)
    require_weights(directory, config, logical_shapes(args.model, args.batch.seq_len))
    if adapter is not None:
        require_adapter(adapter, adapter_shapes(args.model, args.batch.seq_len, args.tuning))


def init_from(args: Arguments, built: Built) -> None:
    """Begin with the weights of a Hugging Face model, each byte of which one rank reads, and with adapters on it.

    Raises InteropError.
    """
    directory, adapter = begun_with(args.checkpoint.init_from or "")
    config = read_config(directory).predicting(args.model.mtp_layers)
    shapes = logical_shapes(args.model, args.batch.seq_len)
    weights = [s for s in built.optimizer.slices() if s.name.startswith("model/")]
    named = [replace(s, name=s.name.removeprefix("model/")) for s in weights]
    base = [s for s in named if not is_adapter(s.name)]
    load_weights(directory, config, shapes, base, built.stepper.state.axis("tp", "cp", "dp", "pp"))
    if adapter is None:
        built.optimizer.initialize(args.run.seed, is_adapter)
    else:
        load_adapter(adapter, adapter_shapes(args.model, args.batch.seq_len, args.tuning), named)
    built.optimizer.loaded(0)


def outgoing_of(args: Arguments) -> Outgoing | None:
    """How the model goes out at the end, where it does; what could stand against that is said before the run."""
    if args.checkpoint.export_hf is None:
        return None
    require_empty(Path(args.checkpoint.export_hf).expanduser())
    return Outgoing.of(args)


def export_live(to: Path, outgoing: Outgoing, built: Built) -> None:
    """Write the model of a run as a Hugging Face directory: all ranks hand their parts over, the first one writes."""
    axis = built.stepper.state.axis("tp", "cp", "dp", "pp")
    source = outgoing.merged(Live(built.optimizer.slices(), axis))
    if axis.rank == 0:
        export(to, outgoing.raw, outgoing.named, source, limit=SHARD)
        copy_beside(outgoing.beside, to)
    else:
        for _ in tensors(ordered(outgoing.named, SHARD), source):
            pass
