"""`stretto sample`: continue a prompt from a checkpoint, in one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from stretto.arguments import from_dict


@dataclass(frozen=True)
class Sample:
    """Continue a prompt from a checkpoint that any layout wrote. Elsewhere than on a terminal, prints text alone."""

    checkpoint: Annotated[Path, tyro.conf.arg(help="a checkpoint, or a directory of a run: its newest one")]
    prompt: Annotated[str, tyro.conf.arg(help="the text to go on from")]
    tokens: Annotated[int, tyro.conf.arg(help="tokens to add")] = 200
    temperature: Annotated[float, tyro.conf.arg(help="0 takes the likeliest token each time")] = 0.8
    top_k: Annotated[int, tyro.conf.arg(help="draw from so many likeliest tokens alone; 0: from all")] = 0
    seed: Annotated[int, tyro.conf.arg(help="of the draws")] = 0
    tokenizer: Annotated[str | None, tyro.conf.arg(help="where the run's tokenizer.json lies now, if it has moved")] = (
        None
    )


def main(argv: Sequence[str]) -> int:
    """Run `stretto sample ...`; 0, or 2 when the checkpoint cannot be used."""
    wanted = tyro.cli(Sample, prog="stretto sample", args=list(argv))
    from stretto.checkpoint import CheckpointError
    from stretto.data.errors import DataError

    try:
        continued = _continue(wanted)
    except (CheckpointError, DataError, ValueError) as error:
        print(f"stretto sample: {error}", file=sys.stderr)
        return 2
    from stretto.report.printable import printable
    from stretto.report.summary import sample_panel

    console = Console()
    if console.is_terminal:
        console.print(sample_panel(wanted.prompt, continued))
    else:
        print(printable(wanted.prompt + continued))
    return 0


def _continue(wanted: Sample) -> str:
    from stretto.checkpoint import CheckpointError
    from stretto.checkpoint.marker import inspect, read_extra
    from stretto.data.tokenizer import load_tokenizer
    from stretto.train.run import load_whole
    from stretto.train.sample import sample
    from stretto.world import World

    wrong = [
        f"--{name.replace('_', '-')} {value}: must be at least {least}"
        for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 0))
        if not (value := getattr(wanted, name)) >= least
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    path = _newest(wanted.checkpoint)
    inspect(path)
    extra = read_extra(path)
    if "record" not in extra:
        raise CheckpointError(f"{path} was not written by `stretto train`: it does not say which model it holds")
    args = from_dict(extra["record"]["arguments"])
    tokenizer = load_tokenizer(wanted.tokenizer or args.data.tokenizer)
    if tokenizer.vocab_size > args.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model {args.model.vocab_size}: it was trained with "
            f"another one than {wanted.tokenizer or args.data.tokenizer}"
        )
    tokens = sample(
        load_whole(args, path, World.single()).stages[0],
        [*tokenizer.encode(wanted.prompt).tolist()] or [tokenizer.eod],
        wanted.tokens,
        context=args.batch.seq_len,
        vocab=tokenizer.vocab_size,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        seed=wanted.seed,
        end=tokenizer.eod,
    )
    return tokenizer.decode(np.array(tokens, dtype=np.int64))


def _newest(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest one of a run."""
    from stretto.checkpoint import CheckpointError, latest_complete

    for directory in (path, path / "checkpoints"):
        if found := latest_complete(directory).path:
            return found
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    return path
