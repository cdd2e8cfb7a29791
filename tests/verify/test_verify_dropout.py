"""P11: every layout drops what one process drops, and a recomputation changes no bit.

Faults to catch: tensor-parallel ranks that all draw the first positions under sequence parallelism; tensor-parallel
ranks that draw different positions without it; a mask that knows the row of the microbatch in place of the sample; a
mask that knows the row of the rank in place of the sample.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from verify_checks import compare, first_wrong, small

from stretto.arguments.schema import Arguments
from stretto.layout import Layout
from stretto.structure import Structure
from stretto.tensor_parallel import Dropout
from stretto.testing import Pool
from stretto.verify import Session, build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo

ROWS = 8
LAYOUTS = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp2-pp2-dp2": {"tp": 2, "pp": 2, "dp": 2},
    "tp2-sp-pp2-dp2": {"tp": 2, "sp": True, "pp": 2, "dp": 2},
    "tp4-sp": {"tp": 4, "sp": True},
}
AT_NIGHT = ("tp2-sp", "tp4-sp", "pp2", "tp2-pp2-dp2")
CASES = [
    pytest.param(sizes, marks=[pytest.mark.nightly] * (name in AT_NIGHT), id=name) for name, sizes in LAYOUTS.items()
]
EVERY = pytest.mark.parametrize("sizes", CASES)

Piece = tuple[str, int, int, Tensor]
"""Name of a place in the model, sample, first position, and what falls away of these [n, h]."""


@pytest.fixture(scope="module")
def alone(pool: Pool) -> list[Piece]:
    """What falls away on one process."""
    return pool.run(1, masks, arguments())[0]


@EVERY
def test_every_layout_drops_slices_of_the_whole_mask(pool: Pool, alone: list[Piece], sizes: dict[str, int]) -> None:
    args = arguments(**sizes)
    whole = {(name, sample): mask for name, sample, _, mask in alone}
    assert len(whole) == len(alone) == ROWS * (1 + 2 * args.model.layers)
    assert len({mask.numpy().tobytes() for mask in whole.values()}) == len(whole)
    seen = {place: torch.zeros(len(mask), dtype=torch.bool) for place, mask in whole.items()}
    for pieces in pool.run(ranks(args), masks, args):
        for name, sample, first, mask in pieces:
            assert torch.equal(mask, whole[name, sample][first : first + len(mask)])
            seen[name, sample][first : first + len(mask)] = True
    assert all(positions.all() for positions in seen.values())


@EVERY
def test_dropout_trains_as_in_one_process(pool: Pool, sizes: dict[str, int]) -> None:
    """Loss, gradients and updates of two steps to 1e-10; with recomputation, of which the reference has none."""
    assert set(pool.run(ranks(arguments(**sizes)), differs, arguments(**sizes))) == {""}


@pytest.mark.parametrize(
    "sizes", [{}, {"dp": 2}, pytest.param({"pp": 2}, marks=pytest.mark.nightly)], ids=["one process", "dp2", "pp2"]
)
def test_the_size_of_the_microbatch_does_not_matter(pool: Pool, sizes: dict[str, int]) -> None:
    args = arguments(**sizes)
    found = [pool.run(ranks(args), gradients, micro(args, b))[0] for b in (1, 2)]
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name], one, rtol=1e-10, atol=1e-13, msg=name)


@EVERY
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.nightly), 0.2])
def test_recomputation_changes_no_bit_in_any_layout(pool: Pool, sizes: dict[str, int], dropout: float) -> None:
    """Neither of loss, norm and gradients, nor of what `observe` sees of activations on the way."""
    args = arguments(**sizes, dropout=dropout)
    recompute = replace(args, run=replace(args.run, recompute="block"))
    kept, computed = (pool.run(ranks(args), gradients, each) for each in (args, recompute))
    for a, b in zip(kept, computed, strict=True):
        assert a.keys() == b.keys()
        assert not [name for name in a if not torch.equal(a[name], b[name])]


def arguments(*, dropout: float = 0.2, **sizes: int) -> Arguments:
    return small(rows=ROWS, dropout=dropout, position="learned", bias=True, **sizes)


def micro(args: Arguments, rows: int) -> Arguments:
    return replace(args, batch=replace(args.batch, micro_batch=rows))


def ranks(args: Arguments) -> int:
    return layout(args).world


def layout(args: Arguments) -> Layout:
    p = args.parallel
    return Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1)


def differs(world: World, args: Arguments) -> str:
    return first_wrong(compare(world, args))


def gradients(world: World, args: Arguments) -> dict[str, Tensor]:
    """Loss, norm and gradients of a step, and projections of activations and their gradients."""
    with build(args, layout(args), world) as session:
        session.load_full(random_weights(session, 0))
        loss, norm = session.step(random_batch(args, 1), observe=True)
        numbers = {"loss": loss, "norm": norm}
        passed = {f"output of {n}": x for n, x in session.seen.outputs.items()}
        passed |= {f"gradient of {n}": x for n, x in session.seen.gradients.items()}
        return {n: torch.tensor(x, dtype=torch.float64) for n, x in numbers.items()} | session.full_grads() | passed


def masks(world: World, args: Arguments) -> list[Piece]:
    """What each dropout of this rank's stages makes zero in a step."""
    found: list[Piece] = []
    with build(args, layout(args), world) as session:
        session.load_full(random_weights(session, 0))
        for module in dropouts(session):
            module.register_forward_hook(lambda *seen: found.extend(pieces(args, *seen)))
        session.step(random_batch(args, 1))
    return found


def dropouts(session: Session) -> list[Dropout]:
    return [m for stage in session.built.stages.values() for m in stage.modules() if isinstance(m, Dropout)]


def pieces(args: Arguments, module: nn.Module, given: tuple[Tensor, Structure], y: Tensor) -> list[Piece]:
    assert isinstance(module, Dropout)
    x, structure = given
    assert structure.samples is not None
    assert x.all(), "what is zero already says nothing"
    first = module.tp.rank * len(x) if args.parallel.sequence_parallel else 0
    return [(module.name, int(sample), first, y[:, row] == 0) for row, sample in enumerate(structure.samples)]
