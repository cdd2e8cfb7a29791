"""`--schedule-costs FILE`: what the stages of a run take, from one run to the next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stretto.arguments.schema import Arguments
from stretto.estimate import stage_counts, stage_pieces
from stretto.exchange import broadcast_json
from stretto.parallel_state import ParallelState
from stretto.schedule import Cost
from stretto.schedule.measured import cost_text, read_cost
from stretto.schedule.pieces import cost_for
from stretto.terminal import say
from stretto.train.consensus import RunRejectedError, on_all_ranks


def costs_text(args: Arguments) -> str | None:
    """What is in the file, where one was named and is there."""
    path = args.parallel.schedule_costs
    return Path(path).read_text(encoding="utf-8") if path is not None and Path(path).exists() else None


def read_costs(args: Arguments, state: ParallelState) -> Cost | None:
    """What the file holds, as rank 0 sees it, on all ranks; None where there is none. Raises RunRejectedError."""
    if args.parallel.schedule_costs is None:
        return None
    path, layers, shares = args.parallel.schedule_costs, stage_counts(args), stage_pieces(args).shares

    def read() -> str | None:
        if state.world.rank != 0 or (text := costs_text(args)) is None:
            return None
        try:
            return cost_text(cost_for(text, path, layers, shares))
        except ValueError as error:
            raise RunRejectedError(str(error)) from None

    told = broadcast_json(on_all_ranks(state, read), state.axis("tp", "cp", "dp", "pp"))
    return None if told is None else replace(read_cost(told, path), barrier=not args.optimizer.post_validate)


def write_costs(args: Arguments, cost: Cost) -> None:
    """Keep them for the next run, if a file was named; a run does not end for want of it."""
    if args.parallel.schedule_costs is None:
        return
    path = Path(args.parallel.schedule_costs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(cost_text(cost, stage_counts(args)), encoding="utf-8")
    except OSError as error:
        say(f"the costs of the stages were not written to {path}: {error}")
