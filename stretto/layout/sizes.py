"""From sizes and an order, as a user says them, to the digits of the two views; all complaints at once."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

Size = int | tuple[int, ...]
Digits = tuple[tuple[str, int], ...]

DENSE = ("tp", "cp", "dp", "pp")
EXPERT = ("etp", "ep", "edp", "pp")
DEFAULT_ORDER = "tp-cp-ep-dp-pp"

# Where the expert axes stand in an order that names the dense ones: experts lie on the same ranks, so expert
# tensor parallel takes the place of tensor parallel and expert data parallel that of data parallel.
_EXPERT_FOR = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}


def digits(sizes: Mapping[str, Size], order: str, expert_order: str | None) -> tuple[Digits, Digits]:
    """The dense and the expert digits, fastest first.

    Raises `ValueError` with everything that is wrong.
    """
    problems = [p for name, size in sizes.items() for p in _check_size(name, size)]
    if problems:
        raise ValueError("\n".join(problems))
    levels = {name: size if isinstance(size, tuple) else (size,) for name, size in sizes.items()}
    whole = {name: prod(parts) for name, parts in levels.items()}
    named = {name: whole[name] for name in DEFAULT_ORDER.split("-")}
    problems += _check_order("order", order, named if expert_order is None else {**named, "ep": 1})
    if expert_order is not None:
        problems += _check_order("expert_order", expert_order, {n: whole.get(n, 1) for n in EXPERT})
    elif whole["etp"] > 1 and "tp" not in order.split("-"):
        problems.append(f"order={order!r} has no place for etp={whole['etp']}, which stands where tp does")
    problems += _check_experts(whole, levels["dp"][1:])
    if problems:
        raise ValueError("\n".join(problems))
    names = _complete(order, DEFAULT_ORDER.split("-"))
    dense = tuple(digit for name in names if name in DENSE for digit in _levels(name, levels[name]))
    if expert_order is None:
        expert_names = [_EXPERT_FOR[name] for name in names if name in _EXPERT_FOR]
    else:
        expert_names = _complete(expert_order, EXPERT)
    return dense, _expert(expert_names, dense, whole, levels["dp"][1:])


def _expert(names: list[str], dense: Digits, whole: Mapping[str, int], outer: tuple[int, ...]) -> Digits:
    """Expert digits in the order of `names`, with stages as far apart as in the dense view.

    Expert data parallel fills up what the other axes leave, on both sides of the stages if need be, and keeps
    the outer levels of data parallel, so that replicas of sharded state are the same ranks in both views.
    """
    stage = names.index("pp")
    fills_before = names.index("edp") < stage
    sizes = {name: whole[name] for name in EXPERT if name != "edp"}
    pp_stride = prod(size for _, size in dense[: [name for name, _ in dense].index("pp")])
    before = prod(sizes[name] for name in names[:stage] if name != "edp") * prod(outer if fills_before else ())
    inner = whole["tp"] * whole["cp"] * whole["dp"] // (whole["etp"] * whole["ep"] * prod(outer))
    # Of the ranks of edp, `near` lie closer together than neighbouring stages do, and `far` such sets beyond.
    if whole["pp"] == 1:
        near, far = (inner, 1) if fills_before else (1, inner)
    else:
        near = max(1, pp_stride // before)
        far = inner // near
    if whole["pp"] > 1 and (before * near != pp_stride or near * far != inner):
        raise ValueError(
            f"in the order {'-'.join(names)} of the expert axes (etp={whole['etp']}, ep={whole['ep']}, "
            f"edp={inner * prod(outer)}), pipeline stages cannot lie {pp_stride} ranks apart, as they do for "
            f"the dense axes; put pp last in both orders"
        )
    (level, _), *replicas = _levels("edp", (inner, *outer))
    split = _levels(level, tuple(size for size in (near, far) if size > 1) or (1,))
    first = split[: int(near > 1 or (fills_before and far == 1))]
    rest = split[len(first) :]
    pp = ("pp", whole["pp"])
    places = {name: [(name, size)] for name, size in sizes.items()}
    places["edp"] = [*first, *replicas] if fills_before else [*rest, *replicas]
    places["pp"] = [pp, *rest] if fills_before else [*first, pp]
    return tuple(digit for name in names for digit in places[name])


def _levels(axis: str, sizes: tuple[int, ...]) -> list[tuple[str, int]]:
    """The digits of an axis, fastest first: `dp`, or `dp.0 dp.1` where it has levels."""
    return [(axis if len(sizes) == 1 else f"{axis}.{i}", size) for i, size in enumerate(sizes)]


def _complete(order: str, names: list[str] | tuple[str, ...]) -> list[str]:
    """The order, and after it the axes of size 1 that it leaves out."""
    given = order.split("-")
    return [*given, *(name for name in names if name not in given)]


def _check_size(name: str, size: Size) -> list[str]:
    parts = size if isinstance(size, tuple) and size else (size,)
    if all(type(part) is int and part >= 1 for part in parts):
        return []
    return [f"{name}={size!r}: the size of an axis is a whole number of at least 1 (or one for each level)"]


def _check_order(what: str, order: str, sizes: Mapping[str, int]) -> list[str]:
    given = order.split("-")
    unknown = [name for name in dict.fromkeys(given) if name not in sizes]
    twice = [name for name in dict.fromkeys(given) if given.count(name) > 1]
    missing = [f"{name}={size}" for name, size in sizes.items() if size > 1 and name not in given]
    said = f"{what}={order!r}"
    return [
        *(f"{said} names {name!r}; the axes are {', '.join(sizes)}" for name in unknown),
        *(f"{said} names {name} more than once" for name in twice),
        *(f"{said} leaves out {name}; as in {what}={'-'.join(sizes)!r}" for name in missing),
    ]


def _check_experts(whole: Mapping[str, int], outer: tuple[int, ...]) -> list[str]:
    stage = whole["tp"] * whole["cp"] * whole["dp"]
    experts = whole["etp"] * whole["ep"]
    equation = f"{whole['tp']}*{whole['cp']}*{whole['dp']} = {stage}"
    if stage % experts:
        fits = [ep for ep in range(1, stage + 1) if stage % (whole["etp"] * ep) == 0]
        near = sorted(sorted(fits, key=lambda ep: abs(ep - whole["ep"]))[:3])
        advice = f"ep={' or '.join(map(str, near))} would" if near else f"no ep does with etp={whole['etp']}"
        return [
            f"etp*ep = {whole['etp']}*{whole['ep']} = {experts} does not divide tp*cp*dp = {equation}, "
            f"the ranks of a pipeline stage; {advice}"
        ]
    if stage // experts % prod(outer):
        return [
            f"dp has {prod(outer)} outer replicas, which do not divide edp = tp*cp*dp/(etp*ep) = "
            f"{stage}/{experts} = {stage // experts}; make ep or the number of replicas smaller"
        ]
    return []
