"""`stretto verify --comms`: what one training step sends, over which axis, beside what it should."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments import Resolved


@dataclass(frozen=True)
class Task:
    """What each worker does."""

    resolved: Resolved

    def __call__(self) -> int:
        """Record a step and validate it; the first rank says what was found, all return its verdict."""
        from stretto.console import console
        from stretto.initialize import initialize
        from stretto.initialize.group import largest
        from stretto.report.communication import communication_table
        from stretto.verify.comms import communication, record_step

        args, layout = self.resolved.args, self.resolved.layout
        wrong = False
        with initialize(device=args.run.device, timeout=args.run.timeout) as world:
            records = record_step(args, layout, world)
            if world.rank == 0:
                found = communication(args, layout, records)
                wrong = not found.right
                p, r = args.parallel, args.run
                extra = ", sequence parallel" if p.sequence_parallel else ""
                extra += "".join(f", {name}={size}" for name, size in (("ep", p.ep), ("etp", p.etp)) if size > 1)
                cut = f" x cp={p.cp}" if p.cp > 1 else ""
                title = f"tp={p.tp}{cut} x pp={p.pp} x dp={p.dp}{extra}, {p.schedule}, {r.dtype} on {r.device}"
                console().print(communication_table(found, title))
            return largest(world, int(wrong))
