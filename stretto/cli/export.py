"""`stretto export`: a checkpoint as a Hugging Face directory, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stretto.arguments import Arguments
from stretto.interop.config import HfConfig, read_config
from stretto.interop.errors import InteropError
from stretto.interop.hub import located
from stretto.interop.write import write_config
from stretto.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.interop.names import Shapes


@dataclass(frozen=True)
class Export:
    """Write a checkpoint as a Hugging Face directory: config.json, tokenizer files, safetensors."""

    checkpoint: Annotated[str, tyro.conf.arg(help="a checkpoint, or a directory of a run: its newest one")]
    to: Annotated[Path, tyro.conf.arg(help="the directory to write: empty, or not there yet")]
    like: Annotated[
        Path | None,
        tyro.conf.arg(help="a model whose config.json, names and dtypes to keep; unset: what --init-from named"),
    ] = None
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        tyro.conf.arg(help="of the weights; unset: that of --like, else of the run"),
    ] = None
    family: Annotated[str | None, tyro.conf.arg(help="model_type to write; unset: the first that fits")] = None
    shard_gb: Annotated[float, tyro.conf.arg(help="size of one file, which is in memory at a time")] = 5.0


def main(argv: Sequence[str]) -> int:
    """Run `stretto export ...`; 0, or 2 when it cannot be written."""
    wanted = tyro.cli(Export, prog="stretto export", args=list(argv))
    from stretto.checkpoint import CheckpointError

    try:
        said = _export(wanted)
    except (CheckpointError, InteropError, OSError) as error:
        say(f"stretto export: {error}")
        return 2
    say(said, out=True)
    return 0


def _export(wanted: Export) -> str:
    from stretto.checkpoint.marker import inspect
    from stretto.cli.sample import newest, recorded
    from stretto.interop.export import copy_beside, export, plan
    from stretto.interop.shapes import logical_shapes

    if not wanted.shard_gb > 0:
        raise InteropError(f"--shard-gb {wanted.shard_gb:g}: must be above 0", [])
    path = newest(wanted.checkpoint)
    inspect(path)
    args = recorded(path)
    like = _like(wanted, args)
    config, raw = _config(wanted, args, like)
    shapes = logical_shapes(args.model, args.batch.seq_len)
    dtype = _dtype(wanted.dtype or args.run.dtype)
    named = plan(config, shapes, dtype, like if wanted.dtype is None else None)
    _require_all(path, shapes)
    files = export(wanted.to, raw, named, _Checkpoint(path), limit=int(wanted.shard_gb * 1e9))
    tokenizer = Path(args.data.tokenizer).expanduser()
    beside = [tokenizer if tokenizer.is_dir() else tokenizer.parent] if tokenizer.exists() else []
    copied = [name for directory in (*beside, *([like] if like else [])) for name in copy_beside(directory, wanted.to)]
    size = sum(file.stat().st_size for file in files)
    also = f" and {', '.join(dict.fromkeys(copied))}" if copied else "; the tokenizer has no files to go with it"
    return f"{path} -> {wanted.to}: {config.family.architecture}, {len(files)} files, {size:,} bytes{also}"


@dataclass(frozen=True)
class _Checkpoint:
    """Whole tensors out of a checkpoint of any layout."""

    path: Path

    def __call__(self, wanted: Shapes) -> Mapping[str, Tensor]:
        import torch

        from stretto.checkpoint import load
        from stretto.checkpoint.index import Index
        from stretto.params import Slice
        from stretto.world import World

        known = Index(self.path).tensors
        dtypes = {name: getattr(torch, known[f"model/{name}"].dtype) for name in wanted}
        whole = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in wanted.items()}
        slices = [Slice(f"model/{name}", x, tuple(x.shape), (0,) * x.dim(), True) for name, x in whole.items()]
        load(self.path, slices, World.single(), prefixes=())
        return whole


def _require_all(path: Path, shapes: Shapes) -> None:
    """Each weight of the checkpoint is one of the model, and the other way round."""
    from stretto.checkpoint.index import Index

    known = Index(path).tensors
    there = {name.removeprefix("model/") for name in known if name.startswith("model/")}
    wrong = [f"{name}: not in the checkpoint" for name in shapes.keys() - there]
    wrong += [f"{name}: no tensor of this model" for name in there - shapes.keys()]
    if wrong:
        raise InteropError(f"{path} does not hold the model that it says", sorted(wrong)[:40])


def _like(wanted: Export, args: Arguments) -> Path | None:
    """The directory whose names and dtypes to keep."""
    if wanted.like is not None:
        return wanted.like
    if args.checkpoint.init_from is None or wanted.family is not None:
        return None
    try:
        directory = located(args.checkpoint.init_from)
    except InteropError:  # not there any more: then the run's own settings say what to write
        return None
    return directory if (directory / "config.json").exists() else None


def _config(wanted: Export, args: Arguments, like: Path | None) -> tuple[HfConfig, Mapping[str, Any]]:
    """The family, and what to write as config.json."""
    said = wanted.dtype or args.run.dtype
    name = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}[said]
    if like is None:
        config = write_config(args.model, seq_len=args.batch.seq_len, dtype=name, family=wanted.family)
        return config, config.raw
    config = read_config(like)
    ours = replace(args.model, dropout=config.model.dropout, init_std=config.model.init_std)
    if wrong := [
        f"{n} = {getattr(ours, n)}, there {x}" for n, x in vars(config.model).items() if getattr(ours, n) != x
    ]:
        raise InteropError(f"{like} is a model of another shape than the checkpoint", wrong)
    if wanted.dtype is None:
        return config, config.raw
    return config, {**{k: v for k, v in config.raw.items() if k != "torch_dtype"}, "dtype": name}


def _dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[name]
