"""What goes wrong in the memory of one rank is noticed, and named alike on all.

Faults to catch: replicas along an axis that are not compared; a flipped bit that the checksum does not see; a rank of
the majority that is accused; a NaN in what no token used that is saved;
sharded weights that are looked at where they are not; gathered weights that are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train_readback import loop
from torch import Tensor

from stretto.arguments import parse
from stretto.layout import Layout
from stretto.params import checksum
from stretto.testing import Pool
from stretto.train.sound import UnsoundError, pieces, require_equal_replicas, require_finite
from stretto.verify import Session, build, random_batch
from stretto.world import World

pytestmark = pytest.mark.gloo

WORDS = "--hidden 32 --heads 4 --kv-heads 1 --layers 2 --vocab 61 --seq-len 16 --global-batch 4 --micro-batch 1"
NORM, EMBEDDING = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
DOWN, KEYS = "model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"


def _damaged(
    world: World, words: str, sizes: dict[str, int], rank: int, name: str, damage: Callable[[Tensor], None] | None
) -> tuple[str, str]:
    """What each rank hears of replicas and of numbers, when after a step one rank's slice of a name was damaged."""
    args = parse(f"{WORDS} {words}".split(), env={}).args
    with build(args, Layout.of(**sizes), world) as session:
        session.step(random_batch(args, 1))
        if world.rank == rank and damage is not None:
            (piece,) = [each for each in _everything(session) if each[0] == name]
            damage(piece[1])
        return _said(require_equal_replicas, session), _said(require_finite, session)


def _everything(session: Session) -> list[tuple[str, Tensor]]:
    return [(p.name, p.tensor) for p in pieces(session.built)]


def _said(check: Callable[..., None], session: Session) -> str:
    try:
        check(session.built, session.state, 7)
    except UnsoundError as error:
        return str(error)
    return ""


def flip(x: Tensor) -> None:
    """The last bit of the last element."""
    bits = x.view({2: torch.int16, 4: torch.int32}[x.element_size()])
    bits[(-1,) * x.dim()] ^= 1


def spoil(x: Tensor) -> None:
    x[-1] = math.nan


@pytest.mark.parametrize(
    ("words", "sizes", "rank", "name", "said"),
    [
        ("", {"dp": 4}, 2, f"model/{DOWN}", f"{DOWN} (weights): rank 2, unlike ranks 0-1, 3"),
        ("--dtype bf16", {"dp": 2, "tp": 2}, 3, f"param/{DOWN}", f"{DOWN} (rounded weights): ranks 1, 3 differ"),
        ("", {"tp": 4}, 1, f"exp_avg/{NORM}", f"{NORM} (first moments): rank 1, unlike ranks 0, 2-3"),
        ("", {"tp": 2, "pp": 2}, 1, f"model/{KEYS}", ""),
        ("", {"tp": 2, "pp": 2}, 3, f"model/{KEYS}", f"{KEYS} (weights): ranks 2-3 differ"),
        (
            "--dtype bf16 --masters remainder --optimizer-cpu-offload",
            {"dp": 4},
            1,
            f"param/{DOWN}",
            f"{DOWN} (weights): rank 1, unlike ranks 0, 2-3",
        ),
        (
            "--dtype bf16 --masters remainder --optimizer-cpu-offload --sharding fsdp",
            {"dp": 2, "tp": 2},
            3,
            f"exp_avg/{NORM}",
            f"{NORM} (first moments): ranks 2-3 differ",
        ),
        (
            "--sharding zero1",
            {"dp": 4},
            2,
            f"gathered/{DOWN}",
            f"{DOWN} (gathered weights): rank 2, unlike ranks 0-1, 3",
        ),
        ("--tied", {"pp": 2}, 1, f"exp_avg_sq/{EMBEDDING}", f"{EMBEDDING} (second moments): ranks 0-1 differ"),
    ],
    ids=["data", "rounded", "tensor", "of another stage", "copies", "remainder", "fsdp", "zero1", "tied"],
)
def test_a_flipped_bit_names_parameter_and_rank_on_all_ranks(
    pool: Pool, words: str, sizes: dict[str, int], rank: int, name: str, said: str
) -> None:
    heard = pool.run(math.prod(sizes.values()), _damaged, words, sizes, rank, name, flip if said else None)
    replicas = {each[0] for each in heard}
    assert {each[1] for each in heard} == {""}
    assert len(replicas) == 1
    assert replicas.pop().partition("\n  ")[2].partition("\n")[0] == said


def test_a_nan_in_one_row_is_found_and_named_on_all_ranks(pool: Pool) -> None:
    heard = pool.run(2, _damaged, "", {"tp": 2}, 1, f"model/{EMBEDDING}", spoil)
    assert {text for _, text in heard} == {
        f"after step 7 these hold NaN or infinity, and are not saved:\n  {EMBEDDING} (weights): on rank 1"
    }


def test_a_weight_that_no_token_used_is_not_saved_as_nan(tmp_path: Path) -> None:
    saved: list[int] = []
    with loop(World.single(), tmp_path, "--save-every 3 --vocab 64") as run:
        saves = Mock(failed=False)
        saves.begin.side_effect = lambda: saved.append(run.train_state.step)
        saves.poll.return_value = []
        run.saves = saves
        run.advance()
        run.advance()
        assert saved == [3]
        embedding = next(p.tensor for p in run.assembly.optimizer.slices() if p.name == f"model/{EMBEDDING}")
        embedding[63] = math.nan  # the text has ids up to 60
        run.advance()
        run.advance()
        with pytest.raises(UnsoundError, match=f"after step 6 .*\\n  {EMBEDDING}"):
            run.advance()
        assert saved == [3]


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(1, 5), st.integers(1, 9), st.data())
def test_any_flipped_bit_changes_the_checksum(dtype: torch.dtype, rows: int, columns: int, data: st.DataObject) -> None:
    x = torch.randn(rows, columns).to(dtype)
    before = checksum(x).item()
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    width = 8 * x.element_size()
    bits[row, column] ^= torch.tensor(1).bitwise_left_shift(data.draw(st.integers(0, width - 1))).to(bits.dtype)
    assert checksum(x).item() != before
    assert checksum(torch.arange(6.0).view(3, 2)) != checksum(torch.arange(6.0).view(3, 2).flip(0))
