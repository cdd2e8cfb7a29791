"""What a model goes out as: its config.json, and the names and dtypes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from stretto.arguments import Arguments
from stretto.arguments.paths import SHIPPED
from stretto.arguments.sections import TOKENIZERS
from stretto.interop.adapter_in import begun_with
from stretto.interop.config import HfConfig, read_config
from stretto.interop.errors import InteropError
from stretto.interop.export import Merged, Named, Source, plan
from stretto.interop.files import DTYPES
from stretto.interop.names import Shapes
from stretto.interop.shapes import adapter_shapes, logical_shapes
from stretto.interop.write import differences, write_config

_THEIRS: Final = MappingProxyType({"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"})
_FILED: Final = MappingProxyType({"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp64": "F64"})


@dataclass(frozen=True)
class Outgoing:
    """A model on its way out; `like` is the directory whose names and dtypes it keeps, if it does."""

    config: HfConfig
    raw: Mapping[str, Any]
    named: list[Named]
    shapes: Shapes
    adapters: Shapes
    like: Path | None
    args: Arguments

    @classmethod
    def of(
        cls, args: Arguments, *, like: Path | None = None, dtype: str | None = None, family: str | None = None
    ) -> Outgoing:
        """The model of a run: like the one that it began with, or that is named; in one `dtype` where that is said.

        Raises InteropError.
        """
        like = like or _begun_with(args, family)
        config, raw = _config(args, like, dtype, family)
        shapes = logical_shapes(args.model, args.batch.seq_len)
        named = plan(config, shapes, DTYPES[_FILED[dtype or args.run.dtype]], like if dtype is None else None)
        adapters = adapter_shapes(args.model, args.batch.seq_len, args.tuning)
        return cls(config, raw, named, shapes, adapters, like, args)

    def merged(self, source: Source) -> Source:
        """The source of the tensors of the model, where adapters are in it merged."""
        return Merged(source, self.adapters, self.args.tuning) if self.adapters else source

    @property
    def beside(self) -> list[Path]:
        """Directories with files that go along: of the tokenizer, then of the model that it is like."""
        name = self.args.data.tokenizer
        # One that ships is not a directory here that happens to be called so.
        tokenizer = SHIPPED / name if name in TOKENIZERS else Path(name).expanduser()
        found = [tokenizer if tokenizer.is_dir() else tokenizer.parent] if tokenizer.exists() else []
        return found + ([self.like] if self.like else [])


def _begun_with(args: Arguments, family: str | None) -> Path | None:
    """The directory that the run began with, if it is there still."""
    if args.checkpoint.init_from is None or family is not None:
        return None
    try:
        directory, _ = begun_with(args.checkpoint.init_from)
    except InteropError:  # not there any more: then the run's own settings say what to write
        return None
    return directory if (directory / "config.json").exists() else None


def _config(
    args: Arguments, like: Path | None, dtype: str | None, family: str | None
) -> tuple[HfConfig, Mapping[str, Any]]:
    """The family, and what to write as config.json."""
    name = _THEIRS[dtype or args.run.dtype]
    if like is None:
        config = write_config(args.model, seq_len=args.batch.seq_len, dtype=name, family=family)
        return config, config.raw
    config = read_config(like).predicting(args.model.mtp_layers)
    if wrong := [f"{name} = {ours}, there {theirs}" for name, ours, theirs in differences(args.model, config.model)]:
        raise InteropError(f"{like} is a model of another shape than the checkpoint", wrong)
    raw = dict(config.raw)
    if config.further > args.model.mtp_layers:  # what was left out is not said to be there
        raw |= {key: args.model.mtp_layers for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in raw}
    if dtype is None:
        return config, raw
    return config, {**{k: v for k, v in raw.items() if k != "torch_dtype"}, "dtype": name}
