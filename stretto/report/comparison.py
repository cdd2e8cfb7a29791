"""A comparison of layouts: what was compared, how far apart it is, and where to look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stretto.arguments.elsewhere import AXES
from stretto.arguments.schema import Arguments
from stretto.layout import Layout
from stretto.verify import Comparison, Difference, places, where_to_look
from stretto.verify.compare import Kind
from stretto.verify.reference import replicas

_KINDS: dict[Kind, str] = {
    "initial weight": "initial weights",
    "activation": "activations",
    "loss": "loss",
    "activation gradient": "activation gradients",
    "gradient": "weight gradients",
    "gradient norm": "gradient norm",
    "update": "weight updates",
    "evaluation": "loss after the update",
}
_PARAMETERS = 4
"""Parameters named where all are right: the worst ones."""
_WRONG = 6
"""Parameters named where some are wrong."""
_NAME = 33
"""Letters of a name that fit beside three columns in a line of 80: enough for thousands of layers, or for its end."""


def comparison(found: Comparison, args: Arguments, reference: Layout) -> Group:
    """The largest error of each kind, the worst parameters, where to look, and the verdict; fits 80 columns."""
    parts: list[RenderableType] = [_heading(found, args, reference), Text(), _kinds(found), Text(), _parameters(found)]
    for paragraph in where_to_look(found, args, places(args)):
        parts += [Text(), Padding(Text(paragraph), (0, 2))]
    return Group(*parts, Text(), _verdict(found, args, reference))


def as_data(found: Comparison, args: Arguments, reference: Layout) -> dict[str, Any]:
    """The same for programs, with every difference. An error or limit that is no finite number is null."""
    return {
        "equal": found.equal,
        "layout": _sizes(args),
        "sequence_parallel": args.parallel.sequence_parallel,
        "schedule": args.parallel.schedule,
        "against": {axis: reference.size(axis) for axis in AXES},
        "dtype": args.run.dtype,
        "device": args.run.device,
        "first_forward": _first(found, "activation"),
        "first_backward": _first(found, "activation gradient"),
        "replicas_unequal": list(found.unequal),
        "where_to_look": where_to_look(found, args, places(args)),
        "differences": [
            {**d.quantity._asdict(), "error": _number(d.error), "limit": _number(d.limit), "factor": d.factor}
            for d in found.differences
        ],
    }


def _heading(found: Comparison, args: Arguments, reference: Layout) -> Table:
    p, r, b = args.parallel, args.run, args.batch
    steps = max((d.quantity.step for d in found.differences), default=0)
    rows = Table.grid(padding=(0, 2))
    also = ", sequence parallel" * p.sequence_parallel + f", {p.schedule}" * (p.pp > 1)
    how = f"{r.dtype} on {r.device}" + f", fp8 {r.fp8}" * (r.fp8 != "none")
    how += f", recompute {r.recompute}" * (r.recompute != "none")
    how += f", exact {p.exact}" * (p.exact is not None)
    rows.add_row(Text(" layout", "dim"), f"{_named(_sizes(args))}{also}, {how}")
    rows.add_row(Text(" against", "dim"), _named({axis: reference.size(axis) for axis in AXES}))
    rows.add_row(Text(" over", "dim"), f"{steps} updates of {b.global_batch} x {b.seq_len} tokens, some of them masked")
    return rows


def _kinds(found: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, padding=(0, 1), show_edge=False)
    table.add_column("", no_wrap=True, min_width=22)
    table.add_column("error", justify="right", no_wrap=True, min_width=7)
    table.add_column("allowed", justify="right", no_wrap=True, min_width=7)
    table.add_column("largest in", no_wrap=True, min_width=_NAME)
    for kind, name in _KINDS.items():
        mine = found.of(kind)
        if mine:
            worst = max(mine, key=lambda d: d.severity)
            table.add_row(_marked(name, not worst.exceeds), *_numbers(worst), _where(worst))
    same = not found.unequal
    table.add_row(_marked("replicas", same), "bitwise" if same else Text("differ", "red"), "", _count(found.unequal))
    return table


def _parameters(found: Comparison) -> Table:
    """The parameters that differ most, their gradients beside their updates, at each one's worst step."""
    worst: dict[str, dict[str, Difference]] = {}
    for d in sorted((*found.of("gradient"), *found.of("update")), key=lambda d: d.severity):
        worst.setdefault(d.quantity.of, {})[d.quantity.kind] = d
    ranked = sorted(worst.items(), key=lambda item: -max(d.severity for d in item[1].values()))
    wrong = [item for item in ranked if any(d.exceeds for d in item[1].values())]
    shown = wrong[:_WRONG] or ranked[:_PARAMETERS]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, padding=(0, 1), show_edge=False)
    table.add_column(
        "parameters that differ" if wrong else "parameters, worst first", no_wrap=True, overflow="ellipsis"
    )
    table.add_column("gradient", justify="right")
    table.add_column("update", justify="right")
    for name, kinds in shown:
        table.add_row(f"  {name}", *(_numbers(kinds[k])[0] if k in kinds else "" for k in ("gradient", "update")))
    left = len(wrong or ranked) - len(shown)
    if left:
        table.add_row(Text(f"  and {left} more", "dim"))
    return table


def _verdict(found: Comparison, args: Arguments, reference: Layout) -> Text:
    if found.equal and args.parallel.exact is not None and replicas(reference) == replicas(args.parallel.layout):
        return Text(" EQUAL to the last bit: the layout does not change the model", "bold green")
    if found.equal:
        return Text(" EQUAL: the layout does not change the model", "bold green")
    return Text(
        f" DIFFERENT: this layout gives not what {'one process' if reference.world == 1 else reference} gives",
        "bold red",
    )


def _numbers(d: Difference) -> tuple[Text, str]:
    limit = "0" if d.limit == 0 else f"{d.limit:.0e}"
    return Text("0" if d.error == 0 else f"{d.error:.1e}", "red" if d.exceeds else "green"), limit


def _marked(name: str, good: bool) -> Text:
    return Text.assemble(("✓ ", "green") if good else ("✗ ", "bold red"), name)


def _where(d: Difference) -> str:
    return "" if d.error == 0 else _short(d.quantity.of) or f"step {d.quantity.step}"


def _short(name: str) -> str:
    """A name without what all have; of a long one the end, which tells more than the beginning."""
    name = name.removesuffix(".weight")
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensors" if names else ""


def _sizes(args: Arguments) -> dict[str, int]:
    return {axis: getattr(args.parallel, axis) or 1 for axis in AXES}


def _named(sizes: dict[str, int]) -> str:
    def large() -> Iterator[str]:
        for axis, size in sizes.items():
            if size > 1:
                yield f"{axis}={size}"

    return " x ".join(large()) or "one process"


def _first(found: Comparison, kind: Kind) -> str | None:
    first, _ = found.first(kind)
    return None if first is None else first.quantity.of


def _number(x: float) -> float | None:
    return x if isfinite(x) else None
