"""What is said when the ranks of a node need more memory than their host has: before the kernel ends them."""

from __future__ import annotations

from collections.abc import Callable

from stretto.arguments import Arguments
from stretto.estimate import fullest
from stretto.estimate.host import HostMemory
from stretto.report.leaner import leaner_on_hosts

GIB = 2**30
MOST = 3

Node = Callable[[Arguments], HostMemory]
"""What a run takes of the node that is asked about."""


def host_full(args: Arguments, node: Node, ranks: int, limit: float) -> str | None:
    """Lines: what the ranks need and what there is, and changes that would fit; None where it fits."""
    need = node(args)
    if need.total <= limit:
        return None
    return "\n".join(
        (
            f"the host has {limit / GIB:.1f} GiB of memory, and its {ranks} rank{'s need' if ranks > 1 else ' needs'} "
            f"{need.total / GIB:.1f}: {need.said}",
            f"  {_ways_out(args, node, limit)}; or fewer ranks on each host",
        )
    )


def _ways_out(args: Arguments, node: Node, limit: float) -> str:
    """Single changes, or two of them where no single one will do."""
    single = list(leaner_on_hosts(args))
    tried = [(words, found, node(found).total) for words, found in single]
    if all(size > limit for *_, size in tried):
        double = {found: f"{words} {more}" for words, one in single for more, found in leaner_on_hosts(one)}
        tried += [(words, found, node(found).total) for found, words in double.items()]
    fit = [_said(args, *each) for each in tried if each[2] <= limit][:MOST]
    if fit:
        return f"would fit: {', or '.join(fit)}"
    nearest = min(tried, key=lambda each: each[2], default=None)
    return f"no change was found that fits{f': {_said(args, *nearest)} comes nearest' if nearest else ''}"


def _said(args: Arguments, words: str, found: Arguments, host: float) -> str:
    device = fullest(found)
    more = f", {device / GIB:.1f} of a device" if args.run.device == "cuda" and device > fullest(args) else ""
    return f"{words} ({host / GIB:.1f} GiB{more})"
