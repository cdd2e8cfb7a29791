"""Parts of a block that are computed once more, over tensor-parallel ranks: equal to one process that keeps all, and
what is communicated once more is what the textbook says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_verify_comms import _record, shown
from test_verify_layouts import arguments

from stretto.arguments.recomputation import PartName
from stretto.arguments.schema import Arguments
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify import against_reference
from stretto.verify.comms import communication
from stretto.world import World

pytestmark = pytest.mark.gloo

PARTS: list[tuple[bool, tuple[PartName, ...]]] = [
    (True, ("norms", "activation", "attention", "projections")),
    (True, ("projections", "norms")),
    (False, ("attention", "activation")),
    (False, ("activation", "projections")),
]


@pytest.mark.parametrize(
    ("sp", "parts"),
    [pytest.param(*c, id="+".join(c[1]), marks=[pytest.mark.nightly] * (n in (1, 2))) for n, c in enumerate(PARTS)],
)
def test_parts_equal_one_process_and_send_what_the_textbook_says(
    pool: Pool, sp: bool, parts: tuple[PartName, ...]
) -> None:
    args = arguments(2, 1, 1, variant=sp << 6)
    run = replace(args.run, recompute="selective", recompute_parts=parts, recompute_layers=args.model.layers - 1)
    args = replace(args, run=run)
    layout = Layout.of(tp=2)
    found = communication(args, layout, pool.run(2, _record, args)[0])
    assert found.right, shown(found)
    assert pool.run(2, _differences, args) == ["", ""]


def _differences(world: World, args: Arguments) -> str:
    compared = against_reference(args, Layout.of(tp=world.size), world, steps=1)
    return "" if compared.equal else str([d for d in compared.differences if d.severity > 1][:3])
