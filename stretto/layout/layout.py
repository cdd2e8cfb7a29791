"""`Layout`: the one statement of how ranks lie on the axes of parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from stretto.layout.sizes import DEFAULT_ORDER, DENSE, EXPERT, Size, digits
from stretto.layout.stages import Shape, check_stages, placement
from stretto.layout.view import View

EMBED = "embed"


@dataclass(frozen=True)
class Layout:
    """Ranks 0..world-1 on named axes, seen twice: by the dense layers and by the experts.

    Dense axes are `tp cp dp pp`; expert axes are `etp ep edp pp`, over the same ranks, with
    etp * ep * edp = tp * cp * dp. The derived axis `embed` joins the ranks of the first and of the last pipeline
    stage, which both hold a tied embedding; every other rank is alone on it, and so is one that holds both.

    A rank holds `vpp` stages, which go along the pipeline in a loop or in a v: see `placement`.

    An axis may have levels, fastest first: with `dp=(8, 2)`, state is sharded over the 8 ranks of `dp.0`, of
    which there are 2 replicas, along `dp.1`; with `cp=(4, 2)`, `cp.0` is the inner ring of 4.

    Build one with `Layout.of`.
    """

    dense: View
    expert: View
    vpp: int = 1
    shape: Shape = "loop"

    @classmethod
    def of(
        cls,
        *,
        tp: Size = 1,
        cp: Size = 1,
        dp: Size = 1,
        pp: int = 1,
        ep: int = 1,
        etp: int = 1,
        order: str = DEFAULT_ORDER,
        expert_order: str | None = None,
        vpp: int = 1,
        shape: Shape = "loop",
    ) -> Layout:
        """The layout of these sizes, with ranks counted along `order`, fastest axis first.

        An order may leave out axes of size 1. `expert_order`, as in `etp-ep-edp-pp`, defaults to `order` with
        etp in the place of tp and edp in that of dp.

        Raises:
            ValueError: with all that is wrong: a size below 1, an order that names an axis twice, not at all
                or an unknown one, experts that do not divide the ranks of a stage, or orders that give the
                two views different pipeline stages.
        """
        if problems := check_stages(vpp, shape):
            raise ValueError("\n".join(problems))
        sizes = {"tp": tp, "cp": cp, "dp": dp, "pp": pp, "ep": ep, "etp": etp}
        dense, expert = digits(sizes, order, expert_order)
        return cls(View(dense), View(expert), vpp, shape)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dense.world

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All names that may be asked for: whole axes, their levels, and `embed`."""
        return (*dict.fromkeys((*self.dense.levels, *self.expert.levels)), EMBED)

    @property
    def has_experts(self) -> bool:
        """Whether the experts lie differently on the ranks than dense layers under plain data parallelism."""
        return self.expert.size("ep", "etp") > 1

    @cached_property
    def placement(self) -> tuple[int, ...]:
        """The coordinate on `pp` of the holder of each pipeline stage."""
        return placement(self.dense.size("pp"), self.vpp, self.shape)

    def stages(self, rank: int) -> tuple[int, ...]:
        """The pipeline stages that `rank` holds, in the order of the model."""
        here = self.coords(rank)["pp"]
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == here)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Coordinates on `pp` of the first and of the last stage, ascending."""
        return tuple(sorted({self.placement[0], self.placement[-1]}))

    def size(self, *axes: str) -> int:
        """Number of ranks along `axes` together; `embed` counts the holders of the end stages: 2 or 1."""
        size = self._view(axes).size(*(set(axes) - {EMBED}))
        return size * len(self._ends) if EMBED in axes and "pp" not in axes else size

    def coords(self, rank: int) -> dict[str, int]:
        """Coordinates of `rank` on the dense and on the expert axes."""
        self._check(rank)
        return {**self.dense.coords(rank), **self.expert.coords(rank)}

    def position(self, rank: int) -> dict[str, int]:
        """Coordinates of `rank` on all axes: those of both views, `embed`, and the levels of an axis in its place."""
        found = self.coords(rank)
        for axis in ("cp", "dp", "edp"):
            if levels := self._levels_of(axis):
                del found[axis]
                found |= {level: self.group(rank, level).index(rank) for level in levels}
        return {**found, EMBED: self.group(rank, EMBED).index(rank)}

    def _levels_of(self, axis: str) -> list[str]:
        """Of data parallelism and what is made of it only where dp has them: edp may be split for its order alone."""
        found = [level for level in self.axes if level.startswith(f"{axis}.")]
        return found if axis != "edp" or "dp.0" in self.axes else []

    def rank(self, **coords: int) -> int:
        """The rank at these coordinates: those of one view, or those of both if they agree.

        Axes that are not named are at 0.

        Raises:
            ValueError: an unknown axis, a coordinate out of range, or two views that name different ranks.
        """
        for name, value in coords.items():
            if name not in (*DENSE, *EXPERT):
                raise ValueError(f"unknown axis {name!r}; the axes are {', '.join((*DENSE, *EXPERT[:-1]))}")
            if not 0 <= value < self.size(name):
                raise ValueError(f"{name}={value} is outside 0..{self.size(name) - 1}")
        asked = [view for view in (self.dense, self.expert) if set(coords) & (set(view.axes) - {"pp"})]
        ranks = {view.rank({axis: coords.get(axis, 0) for axis in view.axes}) for view in asked or [self.dense]}
        if len(ranks) > 1:
            raise ValueError(f"{coords}: the dense and the expert coordinates are of ranks {sorted(ranks)}")
        return ranks.pop()

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axes`, ascending, `rank` among them.

        Time and memory are proportional to the group, not to the world.
        """
        self._check(rank)
        view = self._view(axes)
        values = self._values(view, rank, axes)
        origin = view.origin(rank, values)
        return tuple(view.span(values, origin))

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All groups along `axes`, by their lowest rank; every rank is in exactly one."""
        view = self._view(axes)
        fixed = {name: range(size) for name, size in view.digits}
        for digit in view.digits_of(set(axes) - {EMBED}):
            del fixed[digit]
        # Both end stages name the same group over `embed`: a dict keeps it once.
        return sorted(dict.fromkeys(self.group(rank, *axes) for rank in view.span(fixed)))

    def _values(self, view: View, rank: int, axes: tuple[str, ...]) -> dict[str, range]:
        """What the digits of a group along `axes` run over."""
        sizes = dict(view.digits)
        values: dict[str, range] = {d: range(sizes[d]) for d in view.digits_of(set(axes) - {EMBED})}
        if EMBED in axes and "pp" not in axes:
            here = rank // view.strides["pp"] % sizes["pp"]
            first, last = self._ends[0], self._ends[-1]
            joined = here in self._ends and first < last
            values["pp"] = range(first, last + 1, last - first) if joined else range(here, here + 1)
        return values

    def _view(self, axes: tuple[str, ...]) -> View:
        """The view that has all of `axes`."""
        if unknown := [axis for axis in axes if axis not in self.axes]:
            raise ValueError(f"unknown axis {unknown[0]!r}; the axes are {', '.join(self.axes)}")
        for view in (self.dense, self.expert):
            if set(axes) <= {*view.levels, EMBED}:
                return view
        raise ValueError(
            f"{'-'.join(axes)} mixes dense axes ({', '.join(DENSE)}) with expert axes ({', '.join(EXPERT)}); "
            f"ask for the axes of one view"
        )

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside the layout's ranks 0..{self.world - 1}")

    def __str__(self) -> str:
        """Sizes in rank order, as in `tp2-cp1-dp4-pp2`; with experts also `/ etp1-ep4-edp2-pp2`.

        With several stages on a rank also `, 4 stages in a loop`.
        """
        views = (self.dense, self.expert) if self.has_experts else (self.dense,)
        stages = f", {len(self.placement)} stages in a {self.shape}" if self.vpp > 1 else ""
        return " / ".join(map(str, views)) + stages
