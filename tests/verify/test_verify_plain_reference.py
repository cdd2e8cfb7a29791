"""The reference computes plainly: a kernel that is wrong in the run is not wrong in what it is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from stretto.arguments import parse
from stretto.layout import Layout
from stretto.tensor_parallel import formulas
from stretto.train import stages
from stretto.verify import against_reference
from stretto.world import World

pytestmark = pytest.mark.gloo

WORDS = "--preset demo --hidden 16 --heads 2 --layers 1 --vocab 31 --seq-len 8"
WORDS += " --global-batch 2 --micro-batch 1 --dtype fp64"
ALONE = "--tp 1 --pp 1 --nproc 1 --compile"


def right(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    return function


def wrong(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    def backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
        return (1.001 * formulas.swiglu_backward(dy, gate_up)[0],)

    return backward if function is formulas.swiglu_backward else function


@pytest.mark.parametrize(("fused", "equal"), [(right, True), (wrong, False)])
def test_a_wrong_kernel_shows(monkeypatch: pytest.MonkeyPatch, fused: Callable[..., Any], equal: bool) -> None:
    monkeypatch.setattr(stages, "fused", fused)
    args = parse(f"{WORDS} {ALONE}".split()).args
    assert against_reference(args, Layout.of(), World.single()).equal is equal
