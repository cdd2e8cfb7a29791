"""Modules that know nothing of ranks: `replicate`. Each test names the fault that it catches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stretto.distributed.replicate import replicate
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, ParamSpec, collect, declare, fill
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo


def test_values_are_kept_and_matrices_decay() -> None:
    """Catches: values that are drawn anew, or set to zero."""
    module = replicate(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    declared = collect(module)
    into = {item.param: torch.full_like(item.param, torch.nan) for item in declared}
    fill(declared, 0, into.__getitem__)
    assert all(torch.equal(values, param.data) for param, values in into.items())
    assert [(item.name, item.weight_decay) for item in declared] == [
        ("0.weight", True),
        ("0.bias", False),
        ("1.weight", False),
        ("1.bias", False),
    ]


def test_what_is_declared_or_shared_stays_so() -> None:
    """Catches: a second declaration of a tied weight, and one over another's."""
    module = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False), "c": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    declare(module["c"], "weight", ParamSpec((4, 4), Init(std=1.0)))
    names = {item.name: item.init_kept for item in collect(replicate(module))}
    assert names == {"a.weight": True, "c.weight": False, "c.bias": True}


def test_keeping_values_needs_some() -> None:
    with pytest.raises(ValueError, match="init=None keeps the values"):
        declare(nn.Module(), "weight", ParamSpec((3,), None))


def values(world: World) -> list[float]:
    torch.manual_seed(world.rank)
    with ParallelState.build(Layout.of(dp=2, tp=2), world) as state:
        module = replicate(nn.Linear(2, 1), state)
        found: list[float] = torch.cat([p.data.flatten() for p in module.parameters()]).tolist()
        return found


def test_all_ranks_start_from_the_values_of_the_first(pool: Pool) -> None:
    """Catches: replicas, or tensor-parallel ranks, that start from values of their own."""
    torch.manual_seed(0)
    expected = torch.cat([p.data.flatten() for p in nn.Linear(2, 1).parameters()]).tolist()
    assert pool.run(4, values) == [expected] * 4
