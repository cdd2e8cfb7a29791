"""`stretto sample`: continue a prompt from a checkpoint, in one process or over the ranks of a layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from stretto.arguments import Arguments, Record, from_dict
from stretto.arguments.form import Form
from stretto.arguments.setting import REQUIRED, setting
from stretto.cli.command import options
from stretto.reading import shown
from stretto.terminal import say

if TYPE_CHECKING:
    from stretto.data.tokenizer import Tokenizer
    from stretto.layout import Layout
    from stretto.world import World


@dataclass(frozen=True)
class Sample:
    """Continue a prompt from a checkpoint that any layout wrote. Elsewhere than on a terminal, prints text alone."""

    prompt: str = setting(REQUIRED, "the text to go on from")
    checkpoint: str = setting(
        "runs/latest", "a checkpoint, or a directory of a run: its newest one; or a URL", path=True
    )
    tokens: int = setting(200, "tokens to add", at_least=1)
    temperature: float = setting(0.8, "0 takes the likeliest token each time", at_least=0)
    top_k: int = setting(0, "draw from so many likeliest tokens alone; 0: from all", at_least=0)
    top_p: float = setting(1.0, "draw from the likeliest that together have this probability", above=0, at_most=1)
    seed: int = setting(0, "of the draws", at_least=0, at_most=2**63 - 1)
    tp: int = setting(1, "tensor parallel: each matrix is cut over so many ranks", unit="ranks", at_least=1)
    pp: int = setting(1, "pipeline parallel: the layers are cut into so many stages", unit="ranks", at_least=1)
    device: Literal["cpu", "cuda"] = setting("cpu", "where tensors live")
    tokenizer: str | None = setting(None, "where the run's tokenizer.json lies now, if it has moved", path=True)


FORMS: Final = (Form("stretto sample", Sample),)


def main(argv: Sequence[str]) -> int:
    """Run `stretto sample ...`; 0, or 2 when the checkpoint cannot be used."""
    wanted = options(FORMS[0], argv)
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
        from stretto.train.sample import sample, sampled_over

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
    from stretto.cli.this_machine import require_cuda
    from stretto.data.tokenizer import load_tokenizer
    from stretto.layout import Layout

    if started > 1 and started != wanted.tp * wanted.pp:
        raise ValueError(
            f"--tp {wanted.tp} --pp {wanted.pp} take {wanted.tp * wanted.pp} ranks, {started} were started"
        )
    path, layout = newest(wanted.checkpoint), Layout.of(tp=wanted.tp, pp=wanted.pp)
    args = recorded(path)
    args = replace(
        args, run=replace(args.run, device=wanted.device), parallel=replace(args.parallel, stage_layers=None)
    )
    if layout.world > 1:
        args = _validated(args, layout)
    if wanted.device == "cuda":
        require_cuda()
    name = wanted.tokenizer or args.data.tokenizer
    tokenizer = load_tokenizer(name)
    _require_the_same(path, tokenizer, name)
    if tokenizer.vocab_size > args.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model {args.model.vocab_size}: it was trained with "
            f"another one than {name}"
        )
    return Task(wanted, path, args, tokenizer, layout)


def _validated(args: Arguments, layout: Layout) -> Arguments:
    """The run in this layout. Raises ConfigError, with suggestions for the layout alone: the model is what it is."""
    from stretto.arguments.elsewhere import validated_in
    from stretto.arguments.errors import ConfigError

    try:
        return validated_in(args, layout).args
    except ConfigError as error:
        sizes = {"parallel.tp", "parallel.pp"}
        raise ConfigError(
            [
                replace(v, given=(), fixes=tuple(f for f in v.fixes if f.keys() <= sizes), hint="or take one process")
                for v in error.violations
            ]
        ) from None


def _require_the_same(path: Path, tokenizer: Tokenizer, name: str) -> None:
    """Raise ValueError for a tokenizer that is not that of the run: every token would mean something else."""
    from stretto.checkpoint.marker import read_extra

    feed = read_extra(path).get("feed")
    trained = feed.get("tokenizer") if isinstance(feed, dict) else None
    if isinstance(trained, str) and trained and trained != tokenizer.fingerprint:
        raise ValueError(
            f"the run was trained with another tokenizer than {name}: its fingerprint is {shown(trained)}, that of "
            f"{name} is {tokenizer.fingerprint!r}; name the one that it had with --tokenizer"
        )


def newest(said: str, command: str = "stretto sample") -> Path:
    """The checkpoint that a path or URL names: itself, or the newest whole one of a run. Raises CheckpointError."""
    from stretto.checkpoint.survey import checkpoint_of

    return checkpoint_of(said, lambda skipped: say(f"{command}: passing over {skipped}"))


def recorded(path: Path) -> Arguments:
    """The settings of the run that wrote a checkpoint. Raises CheckpointError when they are not there."""
    from stretto.checkpoint.marker import read_extra

    return from_dict(Record.from_dict(read_extra(path).get("record"), str(path)).arguments, name=str(path))
