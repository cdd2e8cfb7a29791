"""P1: a parameter's place follows from its declaration, for any sizes.

Faults to catch: a chunk rounded down; the last chunk not shortened; copies ignored in block; a section that begins
where the one before does; copies ignored in owned; rows of a stack counted without their padding; padding not zero; an
undeclared parameter passed over.
"""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stretto.layout import Layout
from stretto.params import Init, ParamSpec, Part, Shard, collect, declare, fill, slices
from stretto.world import Axis

pytestmark = pytest.mark.gloo


def axis(name: str, rank: int, size: int) -> Axis:
    """A place on an axis; geometry needs no process group."""
    return Axis(name, rank, tuple(range(size)))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ParamSpec, dict[str, int]]:
    """A spec cut along tp, ep, both or neither, and the sizes of the axes."""
    shape = tuple(draw(st.lists(st.integers(0, 30), min_size=2, max_size=3)))
    dims = draw(st.permutations(range(len(shape))))
    shard, sizes = [], {}
    for name, dim in zip(("tp", "ep"), dims, strict=False):
        copies = draw(st.integers(1, 3))
        sizes[name] = copies * draw(st.integers(1, 4))
        if draw(st.booleans()):
            shard.append(Shard(name, dim, copies, draw(st.integers(1, 9))))
    return ParamSpec(shape, Init(), shard=tuple(shard)), sizes


@given(cuts())
def test_blocks_tile_the_tensor_and_one_rank_owns_each(case: tuple[ParamSpec, dict[str, int]]) -> None:
    """Every element is held by someone, equally often, and owned exactly once."""
    spec, sizes = case
    held, owned = torch.zeros(spec.shape), torch.zeros(spec.shape)
    for ranks in product(*(range(n) for n in sizes.values())):
        position = dict(zip(sizes, ranks, strict=True))
        block = spec.block({name: axis(name, position[name], n) for name, n in sizes.items()})
        assert len(block.offsets) == len(block.shape) == len(block.stored) == len(spec.shape)
        assert all(n <= stored for n, stored in zip(block.shape, block.stored, strict=True))
        where = tuple(slice(o, o + n) for o, n in zip(block.offsets, block.shape, strict=True))
        assert held[where].shape == block.shape, "the block reaches over the edge"
        held[where] += 1
        owned[where] += spec.owned(position, list(sizes))
    copies = {cut.axis: cut.copies for cut in spec.shard}
    assert (held == torch.tensor([copies.get(name, n) for name, n in sizes.items()]).prod()).all()
    assert (owned == 1).all()


@given(cuts())
def test_all_ranks_store_the_same_shape(case: tuple[ParamSpec, dict[str, int]]) -> None:
    """What lets their gradients lie in buckets of one size; and no more padding than the multiple asks for."""
    spec, sizes = case
    every = [
        spec.block({name: axis(name, r, n) for (name, n), r in zip(sizes.items(), ranks, strict=True)})
        for ranks in product(*(range(n) for n in sizes.values()))
    ]
    (stored,) = {block.stored for block in every}
    cut = {s.dim: s for s in spec.shard}
    for dim, n in enumerate(spec.shape):
        if dim not in cut:
            assert stored[dim] == n
            continue
        parts, multiple = sizes[cut[dim].axis] // cut[dim].copies, cut[dim].multiple
        assert stored[dim] % multiple == 0
        assert (stored[dim] - multiple) * parts < max(n, 1) <= max(stored[dim] * parts, 1)


def test_reads_like_a_vocabulary() -> None:
    """101 words on four ranks, in multiples of eight; five words leave ranks with nothing."""
    blocks = [
        ParamSpec((101, 6), Init(), (Shard("tp", 0, multiple=8),)).block({"tp": axis("tp", r, 4)}) for r in (0, 3)
    ]
    assert [(b.offsets, b.shape, b.stored) for b in blocks] == [
        ((0, 0), (32, 6), (32, 6)),
        ((96, 0), (5, 6), (32, 6)),
    ]
    few = [ParamSpec((5, 6), Init(), (Shard("tp", 0, multiple=8),)).block({"tp": axis("tp", r, 4)}) for r in range(4)]
    assert [b.shape[0] for b in few] == [5, 0, 0, 0]


def test_reads_like_grouped_queries() -> None:
    """Two heads of three rows on four ranks: ranks 0 and 1 hold the first, ranks 0 and 2 own."""
    spec = ParamSpec((6, 5), Init(), (Shard("tp", 0, copies=2),), sum_grad=("tp",))
    assert [spec.block({"tp": axis("tp", r, 4)}).offsets[0] for r in range(4)] == [0, 0, 3, 3]
    assert [spec.owned({"tp": r, "dp": 0}, ["tp", "dp"]) for r in range(4)] == [True, False, True, False]
    assert not spec.owned({"tp": 0, "dp": 1}, ["tp", "dp"])


@st.composite
def sectioned(draw: st.DrawFn) -> tuple[ParamSpec, int]:
    """A spec one of whose dimensions is cut section by section, and the number of ranks."""
    sections = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=2))
    shape.insert(dim := draw(st.integers(0, len(shape))), sum(sections))
    cut = Shard("tp", dim, multiple=draw(st.integers(1, 3)), sections=sections)
    return ParamSpec(tuple(shape), None, (cut,)), draw(st.integers(1, 4))


@given(sectioned(), st.integers(1, 5))
def test_sections_are_cut_each_by_itself_whole_or_in_flat_parts(case: tuple[ParamSpec, int], shards: int) -> None:
    """What ranks store is the chunk of each section, one after another; slices of it, and of flat parts, tile it."""
    spec, size = case
    full = 1.0 + torch.arange(float(torch.Size(spec.shape).numel())).view(spec.shape)
    (cut,) = spec.shard
    whole, flat = torch.zeros(spec.shape), torch.zeros(spec.shape)
    for rank in range(size):
        module, stored = nn.Module(), []
        for section in full.split(cut.sections, cut.dim):
            alone = ParamSpec(tuple(section.shape), None, (Shard("tp", cut.dim, multiple=cut.multiple),))
            block = alone.block({"tp": axis("tp", rank, size)})
            mine = torch.zeros(block.stored)
            mine[tuple(map(slice, block.shape))] = section.narrow(cut.dim, block.offsets[cut.dim], block.shape[cut.dim])
            stored.append(mine)
        module.w = nn.Parameter(torch.cat(stored, cut.dim))
        declare(module, "w", spec, axes=[axis("tp", rank, size)])
        declared, memory = collect(module), module.w.detach().flatten()
        parts = [range(i * len(memory) // shards, (i + 1) * len(memory) // shards) for i in range(shards)]
        for into, held in [(whole, [module.w.detach()]), (flat, [Part(memory[p.start : p.stop], p) for p in parts])]:
            for of in held:
                for piece in slices(declared, lambda _, of=of: of, {"tp": rank, "dp": 0}):
                    into[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))] += (
                        piece.tensor
                    )
    assert torch.equal(whole, full)
    assert torch.equal(flat, full)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ParamSpec((4,), Init(), (Shard("tp", 1),)), "cannot be cut along dimensions"),
        (lambda: ParamSpec((4, 4), Init(), (Shard("tp", 0), Shard("ep", 0))), "once"),
        (lambda: Shard("tp", -1), "dim counts from 0"),
        (lambda: Shard("tp", 0, copies=0), "from 1"),
        (lambda: Shard("tp", 0, copies=2, sections=(2, 2)), "not held in copies"),
        (lambda: ParamSpec((5, 4), Init(), (Shard("tp", 0, sections=(2, 2)),)), "must add up to it"),
        (lambda: ParamSpec((4,), Init(), (Shard("tp", 0, copies=2),)).block({"tp": axis("tp", 0, 3)}), "2 copies"),
        (lambda: ParamSpec((4,), Init(), (Shard("tp", 0),)).block({}), "cut along tp, but only no axis"),
        (lambda: declare(nn.Module(), "w", [ParamSpec((4, 3), Init()), ParamSpec((4, 5), Init())]), "stacked"),
        (lambda: declare(nn.Module(), "w", [ParamSpec((), Init()), ParamSpec((), Init())]), "stacked"),
        (lambda: declare(nn.Linear(2, 3), "weight", ParamSpec((2, 3), Init())), r"declared \(2, 3\).*has \(3, 2\)"),
        (
            lambda: declare(nn.Module(), "w", [ParamSpec((4,), Init()), ParamSpec((4,), Init(), weight_decay=False)]),
            "agree on replicas and weight decay",
        ),
    ],
)
def test_a_place_that_cannot_be_is_rejected(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


class Stacked(nn.Module):
    """q, k and v in one matrix, k and v padded; and a shared norm under another name."""

    def __init__(self, tp: Axis) -> None:
        super().__init__()
        parts = [("q_proj", 10, 1), ("k_proj", 5, 2), ("v_proj", 5, 2)]
        specs = [
            ParamSpec(
                (rows, 3),
                Init(mean=0.5, std=1.0),
                shard=(Shard("tp", 0, copies),),
                sum_grad=("tp",) if copies > 1 else (),
                part=part,
            )
            for part, rows, copies in parts
        ]
        self.qkv_proj = nn.Module()
        declare(self.qkv_proj, "weight", specs, axes=[tp], dtype=torch.float64)
        self.norm = nn.LayerNorm(3, dtype=torch.float64)
        for name in ("weight", "bias"):
            declare(self.norm, name, ParamSpec((3,), Init(mean=1.0 if name == "weight" else 0.0)))


def whole(seed: int = 3) -> dict[str, Tensor]:
    """The same on one rank, by logical name."""
    declared = collect(Stacked(axis("tp", 0, 2)), "layers.1")
    names = {part.name: part.spec.shape for item in declared for part in item.logical}
    full = {name: torch.empty(shape, dtype=torch.float64) for name, shape in names.items()}
    for name, tensor in full.items():
        module = nn.Module()
        spec = ParamSpec(
            tuple(tensor.shape), Init(0.5, 1.0) if "proj" in name else Init(float("weight" in name)), name=name
        )
        declare(module, "w", spec, dtype=torch.float64)
        fill(collect(module), seed, lambda p: p.data)
        tensor.copy_(module.w.data)
    return full


@pytest.mark.parametrize("tp", [2, 4])
def test_stacked_parts_have_names_values_and_owners_of_their_own(tp: int) -> None:
    full, owners = whole(), Counter[str]()
    assert sorted(full) == [
        "layers.1.k_proj.weight",
        "layers.1.norm.bias",
        "layers.1.norm.weight",
        "layers.1.q_proj.weight",
        "layers.1.v_proj.weight",
    ]
    for rank in range(tp):
        declared = collect(Stacked(axis("tp", rank, tp)), "layers.1")
        fill(declared, 3, lambda p: p.data)
        for piece in slices(declared, lambda p: p.data, {"tp": rank, "dp": 0, "embed": 0}, prefix="model/"):
            name = piece.name.removeprefix("model/")
            where = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))
            assert torch.equal(piece.tensor, full[name][where])
            assert piece.full_shape == full[name].shape
            owners[name] += piece.owner * piece.tensor.numel()
    assert owners == {name: t.numel() for name, t in full.items()}


@pytest.mark.parametrize("rank", [0, 3])
def test_padding_stays_zero_and_views_share_memory(rank: int) -> None:
    """k has five rows in two chunks of three: the second chunk ends in a row of padding, and v follows it."""
    module = Stacked(axis("tp", rank, 4))
    declared = collect(module)
    with torch.no_grad():
        module.qkv_proj.weight.fill_(torch.nan)
    fill(declared, 3, lambda p: p.data)
    stored = module.qkv_proj.weight.data
    assert stored.shape == (3 + 3 + 3, 3)
    padding = {0: [], 3: [1, 2, 5, 8]}[rank]
    assert (stored == 0).all(1).nonzero().flatten().tolist() == padding
    for part in declared[0].logical:
        part.view(stored).fill_(7.0)
    assert (stored == 0).all(1).nonzero().flatten().tolist() == padding
    assert (stored == 7).all(1).sum() == 9 - len(padding)


def test_undeclared_parameters_are_all_named() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": Stacked(axis("tp", 0, 2))})
    with pytest.raises(ValueError, match=r"without a declared place: a\.weight, a\.bias; call stretto\.declare"):
        collect(model)


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_shared_parameter_is_collected_once_under_its_declared_name(order: str) -> None:
    """Whichever module comes first in the model, and also under two names of one module."""
    declaring, using = nn.Module(), nn.Module()
    declare(declaring, "weight", ParamSpec((4, 2), Init(std=1.0)))
    using.register_parameter("tied", declaring.weight)
    both = {"embed": declaring, "head": using}
    (item,) = collect(nn.ModuleDict(both if order == "first" else dict(reversed(both.items()))))
    assert (item.name, item.logical[0].name) == ("embed.weight", "embed.weight")
    declaring.register_parameter("again", declaring.weight)
    assert len(collect(declaring)) == 1
    one = nn.Module()
    one.register_parameter("early", nn.Parameter(torch.zeros(4, 2)))
    one.register_parameter("late", one.early)
    declare(one, "late", ParamSpec((4, 2), Init()))
    assert [d.name for d in collect(one)] == ["late"]


def test_two_parameters_with_one_logical_name_are_rejected() -> None:
    """They would start equal and be saved over each other."""
    model = nn.Module()
    declare(model, "w", [ParamSpec((2,), Init()), ParamSpec((2,), Init())])
    with pytest.raises(ValueError, match="more than one parameter: w"):
        collect(model)


def test_names() -> None:
    """From the module's place, from its part, or given; a parameter of the model itself has its bare name."""
    model = nn.Module()
    declare(model, "scale", ParamSpec((), Init(mean=2.0)))
    model.head = nn.Module()
    declare(model.head, "weight", ParamSpec((2,), Init(), name="embed.weight"))
    declared = collect(model)
    assert [part.name for d in declared for part in d.logical] == ["scale", "embed.weight"]
    fill(declared, 0, lambda p: p.data)
    assert model.scale.item() == 2.0


def test_parts_of_a_block_that_holds_nothing_stay_inside() -> None:
    """Two words on two ranks: the second stores padding alone, of which each shard has a part."""
    module = nn.Module()
    declare(module, "w", ParamSpec((2, 3), Init(std=1.0), (Shard("tp", 0, multiple=8),)), axes=[axis("tp", 1, 2)])
    declared = collect(module)
    for part in (range(12), range(12, 24)):
        fill(declared, 0, lambda p, part=part: Part(p.data.view(-1)[part.start : part.stop], part))
        assert {
            p.offsets
            for p in slices(declared, lambda p, part=part: Part(p.data.view(-1)[part.start : part.stop], part), {})
        } == {(2, 0)}


KINDS = {
    "whole": ParamSpec((6, 4), Init()),
    "cut": ParamSpec((6, 4), Init(), (Shard("tp", 0),)),
    "partial": ParamSpec((6,), Init(), sum_grad=("tp",)),
    "tied": ParamSpec((6, 4), Init(), (Shard("tp", 0),), sum_grad=("embed",)),
    "stack over ep": ParamSpec((4, 6, 4), Init(), (Shard("ep", 0), Shard("etp", 1)), replicas=("edp",)),
    "one expert": ParamSpec((6, 4), Init(), (Shard("etp", 0),), replicas=("edp",), apart=("pp", "ep")),
}


@given(
    *(st.sampled_from([1, 2]) for _ in range(4)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from(sorted(KINDS)),
)
def test_the_owner_follows_from_the_layout(tp: int, cp: int, dp: int, pp: int, ep: int, etp: int, kind: str) -> None:
    """Of the ranks that hold one block exactly one counts for it, on dense and on expert axes.

    Catches: expert axes left out of the owner's, so that a block cut over ep has none, or each replica counts.
    """
    if tp * cp * dp % (ep * etp):
        return
    layout, spec = Layout.of(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp), KINDS[kind]
    owners: dict[object, list[bool]] = {}
    for rank in range(layout.world):
        at = layout.position(rank)
        if kind == "tied" and at["pp"] not in (0, pp - 1):
            continue
        axes = {cut.axis: axis(cut.axis, at[cut.axis], layout.size(cut.axis)) for cut in spec.shard}
        others = tuple(at[name] for name in spec.apart if kind != "tied")
        owners.setdefault((spec.block(axes).offsets, others), []).append(spec.owner(at))
    assert all(each.count(True) == 1 for each in owners.values())
