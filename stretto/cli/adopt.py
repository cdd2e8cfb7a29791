"""`--init-from`: the shape of a Hugging Face model, its tokenizer and adapters, as a source of settings."""

from __future__ import annotations

from stretto.arguments.errors import Violation
from stretto.arguments.layers import Layer, read_layer
from stretto.arguments.sources import Source, SourceKind


def adopted(name: str) -> Layer:
    """The settings that a directory says: those of the model and of adapters on it, and where its tokenizer lies."""
    from stretto.interop.adapter_in import begun_with
    from stretto.interop.config import read_config  # only who names a model waits for its readers
    from stretto.interop.errors import InteropError

    source = Source(SourceKind.MODEL, name)
    try:
        directory, adapter = begun_with(name)
        config = read_config(directory)
    except InteropError as error:
        return Layer(source, {}, (Violation("init_from", ("checkpoint.init_from",), str(error)),))
    # Without a tokenizer.json there the run is rejected until it names another: a model of other tokens learns nothing.
    said = {"model": config.settings(), "data": {"tokenizer": str(directory)}}
    return read_layer(said | ({"tuning": adapter.settings()} if adapter else {}), source)
