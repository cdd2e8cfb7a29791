"""As `verify_said`: settings, in the layout that they were said for and in others."""

from __future__ import annotations

from verify_fault import Fault, Said

ELSEWHERE = Said(
    "tests/arguments/test_arguments_elsewhere.py",
    Fault(
        "an end of a decay for a rate that is constant",
        "arguments/derive.py",
        '_equal("decay_steps", "steps", "lr_schedule != \'constant\'", ',
        '_equal("decay_steps", "steps", "True", ',
    ),
    Fault(
        "time-outs of groups that a layout does not have",
        "arguments/elsewhere.py",
        "graphed(with_peers(replace(args, parallel=parallel, run=replace(args.run, nproc=layout.world))))",
        "graphed(replace(args, parallel=parallel, run=replace(args.run, nproc=layout.world)))",
    ),
)
