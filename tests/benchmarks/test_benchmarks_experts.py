"""The layers of experts that are timed beside each other compute the same, and routing is what it is called."""

from __future__ import annotations

import pytest
import torch

from benchmarks.expert_peers import made
from benchmarks.experts import Case, errors
from stretto.arguments.schema import ModelConfig

pytestmark = pytest.mark.gloo  # no processes, but it imports torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("renormalize", [False, True])
def test_expert_peers_compute_the_same(renormalize):
    """Catches weights renormalized by one alone, gate and up exchanged, rows added to other tokens than they are of."""
    config = ModelConfig(
        layers=1, hidden=64, heads=4, experts=4, top_k=2, expert_ffn=32, router_renormalize=renormalize
    )
    case, truth = Case.of(config, 32, "balanced", CPU), {}  # no scores that are nearly alike
    for name in ("stretto", "stretto-selective", "grouped", "loop"):
        apart = errors(made(name, config, case.router, 32), case, truth)
        assert apart.keys() == {"y", "dx", "router", "gate_up", "down"}
        assert max(apart.values()) < 0.02, (name, apart)


def test_balanced_routing_is_balanced():
    """Every expert gets as many rows, by the router's own choice."""
    config = ModelConfig(layers=1, hidden=128, heads=4, experts=8, top_k=2, expert_ffn=32)
    assert Case.of(config, 64, "balanced", CPU).load == 1
    assert Case.of(config, 64, "uneven", CPU).load > 1.05
