"""P1 for the parts that families add: each layout gives what one process gives, and sends what the textbook says.

Gradients go to the buckets here, as in a run; recomputation, dropout and sequence parallelism are on in some.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_verify_comms import record, shown
from test_verify_layouts import arguments, prove

from stretto.arguments.schema import Arguments
from stretto.testing import Pool
from stretto.verify.comms import communication

pytestmark = pytest.mark.gloo

GEMMA: dict[str, Any] = {
    "activation": "geglu-tanh",
    "norm": "rms",
    "norm_zero_centered": True,
    "norm_placement": "sandwich",
    "scale_embedding": True,
    "tied": True,
    "window": 3,
    "global_layers": (1, 4),
    "position": "rope",
    "rope_local_base": 50.0,
    "attention_softcap": 2.0,
    "logit_softcap": 3.0,
    "attention_scalar": 7.0,
    "bias": False,
}
OLMO: dict[str, Any] = {"norm_placement": "post", "qk_norm": True, "qk_norm_width": "full", "position": "rope"}
NEOX: dict[str, Any] = {"parallel_residual": True, "rope_share": 0.34, "position": "rope", "dropout": 0.2}


def family(sizes: tuple[int, int, int], parts: dict[str, Any], variant: int, recompute: str) -> Arguments:
    args = arguments(*sizes, variant=variant)
    return replace(args, model=replace(args.model, **parts), run=replace(args.run, recompute=recompute))


CASES = [
    ((2, 2, 2), GEMMA, 0b01000000, "selective"),
    pytest.param((4, 2, 1), GEMMA, 0b00000000, "block", marks=pytest.mark.nightly),
    pytest.param((4, 1, 2), OLMO, 0b01000000, "selective", marks=pytest.mark.nightly),
    pytest.param((2, 2, 1), OLMO, 0b00000001, "block", marks=pytest.mark.nightly),
    ((2, 1, 1), OLMO, 0b01010010, "none"),
    ((2, 2, 2), NEOX, 0b01000010, "selective"),
    pytest.param((1, 3, 1), NEOX, 0b00001010, "none", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("sizes", "parts", "variant", "recompute"), CASES)
def test_a_layout_equals_one_process_and_sends_what_it_must(
    pool: Pool, sizes: tuple[int, int, int], parts: dict[str, Any], variant: int, recompute: str
) -> None:
    args = family(sizes, parts, variant, recompute)
    prove(pool, args, steps=1)
    found = communication(args, *record(pool, args))
    assert found.right, shown(found)
