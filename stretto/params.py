"""`ParamSpec`: the one statement of how a parameter lies on the ranks.

A *logical* tensor is what one process would hold under the Hugging Face name (`model.layers.3.self_attn.q_proj.weight`,
vocabulary unpadded). A *stored* parameter is what a module computes with: one logical tensor's local block, or
several stacked along dim 0 (q, k and v in one matrix), perhaps with rows of padding. A module declares each stored
parameter once, with a spec for every logical tensor in it; initial values, gradient sums, norms, checkpoints and
comparisons are derived from the declaration and never restate it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stretto.random import normal_
from stretto.world import Axis

_DECLARED = "_stretto_declared"


@dataclass(frozen=True)
class Shard:
    """Cut `dim` into equal chunks along `axis`.

    The chunk is ceil(n / parts), rounded up to `multiple`; the last chunks may hold less, or nothing, and are stored
    padded. `copies` consecutive positions of the axis hold the same chunk (fewer kv heads than ranks): each then has
    a part of its gradient.
    """

    axis: str
    dim: int
    copies: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.dim < 0 or self.copies < 1 or self.multiple < 1:
            raise ValueError(f"{self}: dim counts from 0, copies and multiple from 1")


@dataclass(frozen=True)
class Init:
    """Initial values: normal deviates times `std`, around `mean`; a constant when `std` is 0."""

    mean: float = 0.0
    std: float = 0.0


@dataclass(frozen=True)
class ParamSpec:
    """Everything that anyone may ask about one logical tensor's place."""

    shape: tuple[int, ...]
    """Full shape, unpadded."""
    init: Init
    shard: tuple[Shard, ...] = ()
    sum_grad: tuple[str, ...] = ()
    """Axes whose ranks each hold a part of the gradient: it must be summed over them."""
    replicas: tuple[str, ...] = ("dp", "cp")
    """Axes that data parallelism reduces over."""
    weight_decay: bool = True
    part: str = ""
    """Replaces the module's own name in the logical name: `self_attn.qkv_proj` holds q_proj, k_proj and v_proj."""
    name: str = ""
    """The whole logical name, where it is not derived from the module's place: the copy of a tied embedding."""

    def __post_init__(self) -> None:
        dims = [cut.dim for cut in self.shard]
        if len({*dims}) != len(dims) or any(dim >= len(self.shape) for dim in dims):
            raise ValueError(f"a tensor {self.shape} cannot be cut along dimensions {dims}: each must exist, and once")

    def block(self, axes: Mapping[str, Axis]) -> Block:
        """The rectangle that a rank at its place on `axes` holds.

        Raises ValueError when an axis is not among `axes` or does not hold a whole number of copies.
        """
        offsets, shape, stored = [0] * len(self.shape), list(self.shape), list(self.shape)
        for cut in self.shard:
            axis, n = _axis(axes, cut.axis), self.shape[cut.dim]
            parts, rest = divmod(axis.size, cut.copies)
            if rest:
                raise ValueError(f"{axis} has {axis.size} ranks, which cannot hold chunks in {cut.copies} copies each")
            chunk = -(-n // parts)
            chunk = -(-chunk // cut.multiple) * cut.multiple
            offsets[cut.dim] = min(axis.rank // cut.copies * chunk, n)
            shape[cut.dim] = min(chunk, n - offsets[cut.dim])
            stored[cut.dim] = chunk
        return Block(tuple(offsets), tuple(shape), tuple(stored))

    def owned(self, position: Mapping[str, int], over: Sequence[str]) -> bool:
        """Whether this rank, of all along the axes `over` that hold the same block, is the one that counts for it.

        `position` gives the rank's coordinate on each of `over`.
        """
        cut = {s.axis: s.copies for s in self.shard}
        return all(position[a] % cut[a] == 0 if a in cut else position[a] == 0 for a in over)


@dataclass(frozen=True)
class Block:
    """A rectangle of a logical tensor (`offsets`, `shape`) and the padded shape in which it is stored."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    stored: tuple[int, ...]


@dataclass(frozen=True)
class Logical:
    """One logical tensor inside a stored parameter: its rows start at `row` of the stored one."""

    name: str
    spec: ParamSpec
    block: Block
    row: int

    def view(self, stored: Tensor) -> Tensor:
        """The local block inside `stored` (the parameter, its gradient, a moment), without padding."""
        part = stored
        if self.block.stored:
            part = part.narrow(0, self.row, self.block.stored[0])
        for dim, n in enumerate(self.block.shape):
            part = part.narrow(dim, 0, n)
        return part


@dataclass(frozen=True, eq=False)
class Declared:
    """A stored parameter and the logical tensors in it."""

    name: str
    param: nn.Parameter
    logical: tuple[Logical, ...]

    @property
    def replicas(self) -> tuple[str, ...]:
        """Axes that data parallelism reduces over: the same for all logical tensors stored together."""
        return self.logical[0].spec.replicas

    @property
    def weight_decay(self) -> bool:
        """Whether weight decay applies: the same for all logical tensors stored together."""
        return self.logical[0].spec.weight_decay


@dataclass(frozen=True)
class Slice:
    """The rectangle of a logical tensor that this rank holds; `owner` on exactly one of the ranks that hold it."""

    name: str
    tensor: Tensor
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    owner: bool


def declare(
    module: nn.Module,
    name: str,
    specs: ParamSpec | Sequence[ParamSpec],
    *,
    axes: Sequence[Axis] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Parameter:
    """Declare the stored parameter `name` of `module`, creating it if the module does not have it yet.

    `axes` are those that the specs cut along. Raises ValueError when an existing parameter has another shape, or the
    specs stored together disagree on what data parallelism and the optimizer must know.
    """
    specs = (specs,) if isinstance(specs, ParamSpec) else tuple(specs)
    if len({(s.replicas, s.weight_decay) for s in specs}) != 1:
        raise ValueError(f"{name}: logical tensors stored together must agree on replicas and weight decay")
    blocks = [s.block({a.name: a for a in axes}) for s in specs]
    if len({b.stored[1:] for b in blocks}) != 1 or (len(blocks) > 1 and not all(b.stored for b in blocks)):
        raise ValueError(f"{name}: {[b.stored for b in blocks]} cannot be stacked along dimension 0")
    first = blocks[0].stored
    stored = (sum(b.stored[0] for b in blocks), *first[1:]) if first else ()
    if getattr(module, name, None) is None:
        setattr(module, name, nn.Parameter(torch.empty(stored, dtype=dtype, device=device)))
    param: nn.Parameter = getattr(module, name)
    if tuple(param.shape) != stored:
        raise ValueError(f"{name}: declared {stored} on this rank, but the parameter has {tuple(param.shape)}")
    module.__dict__.setdefault(_DECLARED, {})[name] = tuple(zip(specs, blocks, strict=True))
    return param


def collect(model: nn.Module, prefix: str = "", elsewhere: Container[nn.Parameter] = ()) -> tuple[Declared, ...]:
    """Every stored parameter of `model` with its logical tensors, in the order of the modules.

    A parameter `elsewhere` is declared by another module, which shares it: an embedding tied to a head on one rank.

    Raises ValueError naming all parameters that were never declared: a parameter whose place is unknown would train
    silently wrong on more than one rank. So would two that claim one logical name: they would start equal, and be
    saved over each other.
    """
    found: dict[nn.Parameter, Declared] = {}
    unknown: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules(prefix=prefix):
        declared = module.__dict__.get(_DECLARED, {})
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            if param in elsewhere:
                continue
            if name in declared:
                found.setdefault(param, Declared(full, param, tuple(_logical(path, name, declared[name]))))
            else:
                unknown[param] = full
    unknown = {p: full for p, full in unknown.items() if p not in found}  # shared with the module that declared it
    if unknown:
        raise ValueError(
            "parameters without a declared place: "
            + ", ".join(unknown.values())
            + "; call stretto.params.declare(module, name, ParamSpec(...)) where each is created"
        )
    names = Counter(part.name for item in found.values() for part in item.logical)
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"logical names declared by more than one parameter: {', '.join(twice)}")
    return tuple(found.values())


def _axis(axes: Mapping[str, Axis], name: str) -> Axis:
    if name not in axes:
        raise ValueError(f"cut along {name}, but only {', '.join(axes) or 'no axis'} was given: pass axes=[...]")
    return axes[name]


def _logical(path: str, name: str, declared: Sequence[tuple[ParamSpec, Block]]) -> Iterator[Logical]:
    row = 0
    for spec, block in declared:
        owner = path.rpartition(".")[0]
        module = ".".join(p for p in (owner, spec.part) if p) if spec.part else path
        yield Logical(spec.name or ".".join(p for p in (module, name) if p), spec, block, row)
        row += block.stored[0] if block.stored else 1


def fill(declared: Sequence[Declared], seed: int, into: Callable[[nn.Parameter], Tensor]) -> None:
    """Write the initial values of every parameter to `into(parameter)`; padding becomes zero.

    The values depend on the seed, the logical name and the element's place in the logical tensor, not on the layout.
    """
    with torch.no_grad():
        for item in declared:
            stored = into(item.param).zero_()
            for logical in item.logical:
                view, init = logical.view(stored), logical.spec.init
                if init.std:
                    normal_(
                        view,
                        seed=seed,
                        name=logical.name,
                        full_shape=logical.spec.shape,
                        offsets=logical.block.offsets,
                        std=init.std,
                    )
                view.add_(init.mean)


def slices(
    declared: Sequence[Declared],
    stored: Callable[[nn.Parameter], Tensor],
    position: Mapping[str, int],
    prefix: str = "",
) -> list[Slice]:
    """This rank's slice of every logical tensor, taken from `stored(parameter)`.

    `position` is the rank's coordinate on every axis along which blocks are repeated (tp, cp, dp, embed).
    """
    return [
        Slice(
            prefix + part.name,
            part.view(stored(item.param)),
            part.spec.shape,
            part.block.offsets,
            part.spec.owned(position, [a for a in position if a != "embed" or "embed" in part.spec.sum_grad]),
        )
        for item in declared
        for part in item.logical
    ]
