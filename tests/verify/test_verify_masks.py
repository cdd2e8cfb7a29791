"""P4: however a batch is split and however unequal its masks are, losses and gradients are sums over all valid tokens
divided by their count; the loss that a run logs and the one that it evaluates included.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from verify_checks import held_out_loss, small

from stretto.arguments.schema import Arguments
from stretto.batch import Batch
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify import build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo

ROWS, SEQ = 8, 8


def masks() -> dict[str, Tensor]:
    """[8, 8] each; with dp=4 rank r has rows r and r + 4, with two microbatches of one row."""
    none = torch.zeros(ROWS, SEQ, dtype=torch.bool)
    one = none.clone()
    one[5, 3] = True
    late = none.clone()
    late[4:] = True
    steps = torch.arange(SEQ) < torch.arange(ROWS)[:, None]
    alternate = none.clone()
    alternate[::4] = True
    return {"one token": one, "last microbatches": late, "unequal": steps, "one rank of four": alternate, "none": none}


LAYOUTS = [
    *({"dp": 4}, {"tp": 2, "dp": 2, "sp": True}, {"tp": 2, "pp": 2}),
    *(pytest.param(sizes, marks=pytest.mark.nightly) for sizes in ({"dp": 2}, {"pp": 2, "dp": 2}, {"pp": 4})),
]


Measured = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def expected(pool: Pool) -> Measured:
    """What one process gives."""
    return pool.run(1, measure, arguments())[0]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_masks_weigh_every_valid_token_alike(pool: Pool, expected: Measured, sizes: dict[str, int]) -> None:
    """Catches division by local counts, a mean of microbatches' means, and 0/0 on a rank without valid tokens."""
    args = arguments(**sizes)
    p = args.parallel
    found = pool.run(p.tp * p.pp * (p.dp or 1), measure, args)
    for rank in found:
        for mask, quantities in expected.items():
            for name, value in quantities.items():
                torch.testing.assert_close(
                    rank[mask][name], value, rtol=1e-9, atol=1e-12, msg=lambda m, at=(mask, name): f"{at}: {m}"
                )


def test_a_loss_is_the_mean_over_valid_tokens(pool: Pool, expected: Measured) -> None:
    """One number that reads like the promise: the mean of the losses of all tokens, each token's taken alone."""
    (each,) = pool.run(1, losses_of_single_tokens, arguments())
    for name in ("unequal", "last microbatches", "one token"):
        torch.testing.assert_close(expected[name]["loss"], each[masks()[name]].mean())
    assert expected["none"]["loss"] == 0
    assert all(not value.any() for value in expected["none"].values())


def test_held_out_text_is_evaluated_the_same_everywhere(pool: Pool) -> None:
    """A last batch that is mostly padding must not weigh as much as a full one."""
    assert pool.run(4, held_out_loss) == [""] * 4


def arguments(**sizes: int) -> Arguments:
    return small(rows=ROWS, **sizes)


def measure(world: World, args: Arguments) -> Measured:
    """For each mask, from the same weights: logged and evaluated loss, gradient norm, and every gradient."""
    p = args.parallel
    found = {}
    with build(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world) as session:
        weights = random_weights(session, 0)
        for name, mask in masks().items():
            batch = random_batch(args, 1)
            batch = Batch(batch.tokens, batch.labels, mask)
            session.load_full(weights)
            evaluated = session.evaluate(batch)
            loss, norm = session.step(batch)
            numbers = {"loss": loss, "evaluated": evaluated, "norm": norm}
            found[name] = {k: torch.tensor(x, dtype=torch.float64) for k, x in numbers.items()} | session.full_grads()
    return found


def losses_of_single_tokens(world: World, args: Arguments) -> Tensor:
    """[8, 8]: the loss of each token, as a batch in which it alone counts."""
    each = torch.zeros(ROWS, SEQ, dtype=torch.float64)
    with build(args, Layout.of(), world) as session:
        session.load_full(random_weights(session, 0))
        batch = random_batch(args, 1)
        for row in range(ROWS):
            for token in range(SEQ):
                mask = torch.zeros(ROWS, SEQ, dtype=torch.bool)
                mask[row, token] = True
                each[row, token] = session.evaluate(Batch(batch.tokens, batch.labels, mask))
    return each
