"""What may change where a run goes on, and what may not."""

from __future__ import annotations

import json

import pytest

from stretto.arguments import Record, parse
from stretto.cli.resume_changes import changes, forbidden, told

pytestmark = pytest.mark.pure

BASE = ["--preset", "tiny", "--nproc", "4", "--tp", "2"]


def record(*words: str) -> Record:
    said = json.loads(json.dumps(parse([*BASE, *words], env={}, files=False).record().as_dict()))
    return Record.from_dict(said, "ckpt/step-00000007")


def gone_on(*words: str) -> tuple[dict[str, tuple[object, object]], list[str]]:
    before = record()
    args = parse(list(words), env={}, files=False, checkpoint=before)
    changed = changes(before, args)
    return changed, [v.problem for v in forbidden(changed, before.name)]


@pytest.mark.parametrize(
    "words",
    [
        "--nproc 1 --tp 1",
        "--nproc 8 --tp 2 --pp 2 --schedule gpipe",
        "--sharding fsdp",
        "--micro-batch 2",
        "--dtype bf16",
        "--recompute block",
    ],
)
def test_layout_and_whatever_leaves_the_model_alone_may_change(words: str) -> None:
    """Catches: a layout that is taken for the model's."""
    changed, wrong = gone_on(*words.split())
    assert changed
    assert wrong == []


def test_nothing_is_told_where_nothing_changed() -> None:
    """Catches: values that differ only by how JSON has them, and those that are derived anew."""
    changed, wrong = gone_on()
    assert (changed, wrong, told(changed)) == ({}, [], None)


def test_what_is_changed_on_purpose_stands_in_one_line() -> None:
    changed, wrong = gone_on("--lr", "2e-3", "--steps", "900", "--weight-decay", "0")
    assert wrong == []
    said = told(changed)
    assert said is not None
    for part in ("optimizer.lr 0.001 is now 0.002", "is now 900", "optimizer.weight_decay 0.1 is now 0"):
        assert part in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("words", "was", "now"),
    [
        ("--hidden 64", "model.hidden was 32", "is 64"),
        ("--seed 7", "run.seed was 1234", "is 7"),
        ("--seq-len 32", "batch.seq_len was 16", "is 32"),
        ("--optimizer sgd", "optimizer.optimizer was adamw", "is sgd"),
        ("--dtype fp64", "run.dtype was fp32", "is fp64"),
        ("--norm layer", "model.norm was rms", "is layer"),
    ],
)
def test_what_may_not_change_is_rejected_with_both_values(words: str, was: str, now: str) -> None:
    """Catches: a change that is found only when tensors do not fit, or never, as another norm would be."""
    _, wrong = gone_on(*words.split())
    assert len(wrong) == 1
    assert f"{was} in ckpt/step-00000007, {now}: " in wrong[0]
