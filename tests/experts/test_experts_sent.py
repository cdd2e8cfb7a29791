"""A step of a model with experts or latents sends what the textbook says, over every axis.

Faults to catch: rows that are sent to each rank of a cut expert twice; latents that cross a border by themselves each;
gradients in bf16 that are gathered in fp32.
A layer that predicts a further token sends what any other does, and uses embedding and head once more.
"""

from __future__ import annotations

from typing import Any

import pytest
from experts_models import GPT_OSS, LATENT, LATENT_V2, MIXTRAL, QWEN2, arguments, layout_of
from rich.console import Console

from stretto.arguments.schema import Arguments
from stretto.collective_trace import CollectiveCall
from stretto.report.communication import communication_table
from stretto.testing import Pool
from stretto.verify.comms import communication, record_step
from stretto.verify.textbook_experts import EXCHANGE
from stretto.world import World

pytestmark = pytest.mark.gloo

CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LATENT, {"tp": 2, "dp": 2, "ep": 2, "sequence_parallel": True}, "selective"),
    (LATENT_V2, {"tp": 2, "dp": 2, "pp": 2, "ep": 4}, "block"),
    (GPT_OSS, {"tp": 2, "dp": 2, "etp": 2, "ep": 2, "sequence_parallel": True}, "none"),
    (QWEN2, {"dp": 4, "ep": 2, "reduce_dtype": "bf16", "sharding": "zero2"}, "none"),
    (MIXTRAL, {"dp": 2, "pp": 2, "ep": 2, "reduce_dtype": "bf16"}, "selective"),
    ({**LATENT, "mtp_layers": 2}, {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True}, "block"),
    ({**QWEN2, "tied": True, "mtp_layers": 1}, {"tp": 2, "cp": 2, "pp": 2, "ep": 2}, "selective"),
]


def _record(world: World, args: Arguments) -> dict[int, list[CollectiveCall]]:
    return record_step(args, layout_of(args), world)


@pytest.mark.parametrize(("model", "parallel", "recompute"), CASES)
def test_a_step_sends_what_the_textbook_says(
    pool: Pool, model: dict[str, Any], parallel: dict[str, Any], recompute: str
) -> None:
    """How many rows leave a rank is the router's choice: no more than all of them, and about those of equal loads."""
    args = arguments(model, run={"recompute": recompute}, **parallel)
    layout = layout_of(args)
    found = communication(args, layout, pool.run(layout.world, _record, args)[0])
    console = Console(width=130)
    with console.capture() as shown:
        console.print(communication_table(found, "a step"))
    assert found.right, shown.get()
    rows = [sent for sent in found.sent if (sent.axis, sent.op) == EXCHANGE]
    assert rows
    assert all(0.3 * sent.textbook < sent.measured.bytes < 3 * sent.textbook for sent in rows)
