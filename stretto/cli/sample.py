"""`stretto sample`: continue a prompt from a checkpoint, in one process or over the ranks of a layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from stretto.arguments import Arguments, Record, from_dict
from stretto.terminal import said_plainly, say

if TYPE_CHECKING:
    from stretto.data.tokenizer import Tokenizer
    from stretto.layout import Layout
    from stretto.world import World


@dataclass(frozen=True)
class Sample:
    """Continue a prompt from a checkpoint that any layout wrote. Elsewhere than on a terminal, prints text alone."""

    checkpoint: Annotated[str, tyro.conf.arg(help="a checkpoint, or a directory of a run: its newest one; or a URL")]
    prompt: Annotated[str, tyro.conf.arg(help="the text to go on from")]
    tokens: Annotated[int, tyro.conf.arg(help="tokens to add")] = 200
    temperature: Annotated[float, tyro.conf.arg(help="0 takes the likeliest token each time")] = 0.8
    top_k: Annotated[int, tyro.conf.arg(help="draw from so many likeliest tokens alone; 0: from all")] = 0
    top_p: Annotated[float, tyro.conf.arg(help="draw from the likeliest that together have this probability")] = 1.0
    seed: Annotated[int, tyro.conf.arg(help="of the draws")] = 0
    tp: Annotated[int, tyro.conf.arg(help="tensor parallel: each matrix is cut over so many ranks")] = 1
    pp: Annotated[int, tyro.conf.arg(help="pipeline parallel: the layers are cut into so many stages")] = 1
    device: Annotated[Literal["cpu", "cuda"], tyro.conf.arg(help="where tensors live")] = "cpu"
    tokenizer: Annotated[str | None, tyro.conf.arg(help="where the run's tokenizer.json lies now, if it has moved")] = (
        None
    )


def main(argv: Sequence[str]) -> int:
    """Run `stretto sample ...`; 0, or 2 when the checkpoint cannot be used."""
    with said_plainly():
        wanted = tyro.cli(Sample, prog="stretto sample", args=list(argv))
    from stretto.arguments import ConfigError
    from stretto.checkpoint import CheckpointError
    from stretto.cli.usage_error import reject
    from stretto.data.errors import DataError
    from stretto.initialize.environment import LaunchError, detect
    from stretto.launch.local import run_local

    try:
        launch = detect(os.environ)
    except LaunchError as error:
        say(f"stretto sample: {error}")
        return 2
    try:
        work = _work(wanted, launch.size)
    except (CheckpointError, ConfigError, DataError, ValueError) as error:
        return reject(error, launch, command="stretto sample")
    alone = launch.source == "python"
    return run_local(work.layout.world, work) if alone and work.layout.world > 1 else work()


@dataclass(frozen=True)
class Task:
    """What each rank does."""

    wanted: Sample
    path: Path
    args: Arguments
    tokenizer: Tokenizer
    layout: Layout

    def __call__(self) -> int:
        """Continue the prompt; the first rank prints it, or why the weights cannot be used."""
        from stretto.checkpoint import CheckpointError
        from stretto.cli.usage_error import reject
        from stretto.initialize import initialize
        from stretto.initialize.environment import detect
        from stretto.world import World

        try:
            if self.layout.world == 1:
                return self._say(self._continued(World.single(self.wanted.device)))
            with initialize(device=self.wanted.device, timeout=self.args.run.timeout) as world:
                continued = self._continued(world)
                return self._say(continued) if world.rank == 0 else 0
        except CheckpointError as error:  # on all ranks alike
            return reject(error, detect(os.environ), command="stretto sample")

    def _continued(self, world: World) -> str:
        from stretto.parallel_state import ParallelState, default_axes
        from stretto.train.run import sampled_over
        from stretto.train.sample import sample

        wanted, tokenizer = self.wanted, self.tokenizer
        axes = default_axes(self.layout, experts=self.args.model.experts > 0)
        with ParallelState.build(self.layout, world, timeout=self.args.run.timeout, axes=axes) as state:
            tokens = sample(
                sampled_over(self.args, self.path, state),
                [*tokenizer.encode(wanted.prompt).tolist()] or [tokenizer.eod],
                wanted.tokens,
                context=self.args.batch.seq_len,
                vocab=tokenizer.vocab_size,
                temperature=wanted.temperature,
                top_k=wanted.top_k,
                top_p=wanted.top_p,
                seed=wanted.seed,
                end=tokenizer.eod,
            )
        return tokenizer.decode(np.array(tokens, dtype=np.int64))

    def _say(self, continued: str) -> int:
        from stretto.console import console
        from stretto.report.summary import sample_panel

        screen = console()
        if screen.is_terminal:
            screen.print(sample_panel(self.wanted.prompt, continued))
        else:
            say(self.wanted.prompt + continued, out=True)
        return 0


def _work(wanted: Sample, started: int) -> Task:
    """All that can be wrong is found here, before any other rank is started; `started` ranks are there already."""
    from stretto.arguments.elsewhere import validated_in
    from stretto.checkpoint.marker import inspect
    from stretto.data.tokenizer import load_tokenizer
    from stretto.layout import Layout

    at_least = (("tokens", 1), ("temperature", 0), ("top_k", 0), ("tp", 1), ("pp", 1))
    wrong = [f"--seed {wanted.seed}: must be 0 to 2^63 - 1"] * (not 0 <= wanted.seed < 2**63)
    wrong += ["--prompt is not UTF-8"] * any("\ud800" <= c <= "\udfff" for c in wanted.prompt)
    wrong += [
        f"--{name.replace('_', '-')} {value}: must be at least {least}"
        for name, least in at_least
        if not (value := getattr(wanted, name)) >= least
    ]
    if not 0 < wanted.top_p <= 1:
        wrong.append(f"--top-p {wanted.top_p:g}: must be above 0 and at most 1")
    if started > 1 and started != wanted.tp * wanted.pp:
        wrong.append(f"--tp {wanted.tp} --pp {wanted.pp} take {wanted.tp * wanted.pp} ranks, {started} were started")
    if wrong:
        raise ValueError("; ".join(wrong))
    path, layout = newest(wanted.checkpoint), Layout.of(tp=wanted.tp, pp=wanted.pp)
    inspect(path)
    args = recorded(path)
    args = replace(
        args, run=replace(args.run, device=wanted.device), parallel=replace(args.parallel, stage_layers=None)
    )
    if layout.world > 1:
        args = validated_in(args, layout).args
    tokenizer = load_tokenizer(wanted.tokenizer or args.data.tokenizer)
    if tokenizer.vocab_size > args.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model {args.model.vocab_size}: it was trained with "
            f"another one than {wanted.tokenizer or args.data.tokenizer}"
        )
    return Task(wanted, path, args, tokenizer, layout)


def newest(said: str) -> Path:
    """The checkpoint that a path or URL names: itself, or the newest one of a run."""
    from stretto.checkpoint import CheckpointError, latest_complete
    from stretto.checkpoint.places import place

    path = place(said)
    for directory in (path, path / "checkpoints"):
        found = latest_complete(directory)
        for skipped in found.skipped:
            say(f"stretto sample: passing over {skipped.path}: {skipped.reason}")
        if found.path:
            return found.path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    return path


def recorded(path: Path) -> Arguments:
    """The settings of the run that wrote a checkpoint. Raises CheckpointError when they are not there."""
    from stretto.checkpoint.marker import read_extra

    return from_dict(Record.from_dict(read_extra(path).get("record"), str(path)).arguments, name=str(path))
