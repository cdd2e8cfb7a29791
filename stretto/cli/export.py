"""`stretto export`: a checkpoint as a Hugging Face directory, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from stretto.arguments.form import Form
from stretto.arguments.setting import REQUIRED, setting
from stretto.cli.command import options
from stretto.interop.errors import InteropError
from stretto.reading import reason
from stretto.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.interop.names import Shapes


@dataclass(frozen=True)
class Export:
    """Write a checkpoint as a Hugging Face directory: config.json, tokenizer files, safetensors."""

    to: str = setting(REQUIRED, "the directory to write: empty, or not there yet", path=True)
    checkpoint: str = setting("runs/latest", "a checkpoint, or a directory of a run: its newest one", path=True)
    like: str | None = setting(
        None, "a model whose config.json, names and dtypes to keep; unset: what --init-from named", path=True
    )
    dtype: Literal["fp32", "bf16", "fp16"] | None = setting(
        None, "of the weights; unset: that of --like, else of the run"
    )
    family: str | None = setting(None, "model_type to write; unset: the first that fits")
    shard_gb: float = setting(5.0, "size of one file", unit="GB", above=0)
    adapter: bool = setting(False, "write adapters alone, as peft reads them, instead of merging them")


FORMS: Final = (Form("stretto export", Export),)


def main(argv: Sequence[str]) -> int:
    """Run `stretto export ...`; 0, or 2 when it cannot be written."""
    wanted = options(FORMS[0], argv)
    from stretto.checkpoint import CheckpointError

    try:
        said = _export(wanted)
    except OSError as error:
        say(f"stretto export: {error.filename or wanted.to}: {reason(error)}")
        return 2
    except (CheckpointError, InteropError) as error:
        say(f"stretto export: {error}")
        return 2
    say(said, out=True)
    return 0


def _export(wanted: Export) -> str:
    from stretto.cli.sample import newest, recorded
    from stretto.interop.adapter import export_adapter
    from stretto.interop.adapter_in import base_of
    from stretto.interop.export import copy_beside, export
    from stretto.interop.outgoing import Outgoing

    path, to = newest(wanted.checkpoint, "stretto export"), Path(wanted.to)
    args = recorded(path)
    outgoing = Outgoing.of(
        args, like=None if wanted.like is None else Path(wanted.like), dtype=wanted.dtype, family=wanted.family
    )
    source = _Checkpoint(path)
    _require_all(source, {**outgoing.shapes, **outgoing.adapters})
    if wanted.adapter:
        base = base_of(args.checkpoint.init_from)
        files = export_adapter(to, outgoing.config, outgoing.shapes, outgoing.adapters, args.tuning, base, source)
        return f"{path} -> {to}: adapters of {base or 'a model of its own'}, {files[0].stat().st_size:,} bytes"
    merged, limit = outgoing.merged(source), int(wanted.shard_gb * 1e9)
    files = export(to, outgoing.raw, outgoing.named, merged, limit=limit)
    copied = copy_beside(outgoing.beside, to)
    size = sum(file.stat().st_size for file in files)
    also = f" and {', '.join(copied)}" if copied else "; the tokenizer has no files to go with it"
    said = f"{outgoing.config.family.architecture}, {len(files)} file{'s' * (len(files) > 1)}, {size:,} bytes"
    return f"{path} -> {to}: {said}{also}"


class _Checkpoint:
    """Whole tensors out of a checkpoint of any layout."""

    def __init__(self, path: Path) -> None:
        from stretto.checkpoint.index import Index

        self.path, self.contents = path, Index(path)

    def __call__(self, wanted: Shapes) -> Mapping[str, Tensor]:
        import torch

        from stretto.checkpoint.planner import reads
        from stretto.checkpoint.reader import read_pieces
        from stretto.params import Slice

        known = self.contents.tensors
        dtypes = {name: getattr(torch, known[f"model/{name}"].dtype) for name in wanted}
        whole = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in wanted.items()}
        slices = [Slice(f"model/{name}", x, tuple(x.shape), (0,) * x.dim(), True) for name, x in whole.items()]
        read_pieces(self.path, reads(self.contents, slices))
        return whole


def _require_all(source: _Checkpoint, shapes: Shapes) -> None:
    """Each weight of the checkpoint is one of the model, and the other way round."""
    there = {name.removeprefix("model/") for name in source.contents.tensors if name.startswith("model/")}
    wrong = [f"{name}: not in the checkpoint" for name in shapes.keys() - there]
    wrong += [f"{name}: no tensor of this model" for name in there - shapes.keys()]
    if wrong:
        raise InteropError(f"{source.path} does not hold the model that it says", sorted(wrong)[:40])
