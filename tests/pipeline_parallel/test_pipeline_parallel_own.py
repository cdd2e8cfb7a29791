"""One's own modules under every schedule, and tables that torch's pipelining reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Pipeline, TensorMeta
from stretto.schedule import GENERATORS, schedule_for
from stretto.schedule.csv import to_csv
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

M, LAYERS = 5, 8


class Layers(nn.Module):
    """Some of eight layers, each with its own weights; on the last stage the loss."""

    def __init__(self, stage: int, stages: int) -> None:
        super().__init__()
        each = LAYERS // stages
        self.first, self.last = stage * each, stage == stages - 1
        self.layers = nn.ModuleList(self.layer(n) for n in range(self.first, self.first + each))

    @staticmethod
    def layer(n: int) -> nn.Linear:
        torch.manual_seed(n)
        return nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x: Tensor | None, rows: Tensor) -> Tensor:
        x = rows if x is None else x
        for n, layer in enumerate(self.layers, self.first):
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False) if n % 2 else layer(x))
        return x.square().sum() if self.last else x


def every(world: World, p: int) -> dict[str, tuple[float, dict[str, Tensor]]]:
    found = {}
    rows = torch.randn(M, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with ParallelState.build(Layout.of(pp=p), world) as state:
        for name in GENERATORS:
            s = schedule_for(name, p, M)
            boundary = TensorMeta((3, 6), torch.float64)
            pipeline = Pipeline(lambda k, n=s.num_stages: Layers(k, n), s, state.axis("pp"), boundary)
            loss = pipeline.step(rows)
            assert torch.equal(pipeline.evaluate(rows), loss)
            assert pipeline.evaluate(rows[:2]) + pipeline.evaluate(rows[2:]) == pytest.approx(loss)
            with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are off: evaluate"):
                pipeline.step(rows)
            grads = {
                f"{module.first + n}.{kind}": p.grad
                for module in pipeline.modules.values()
                for n, layer in enumerate(module.layers)
                for kind, p in layer.named_parameters()
            }
            found[name] = loss.item(), grads
    return found


def test_gradients_are_those_of_one_backward(pool: Pool) -> None:
    """Catches weight gradients that W does not run, or adds to a checkpoint's copy of the weight, and stages that take
    each other's modules."""
    whole = Layers(0, 1)
    rows = torch.randn(M, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = torch.stack([whole(None, row) for row in rows]).sum()
    loss.backward()
    expected = {f"{n}.{kind}": p.grad for n, layer in enumerate(whole.layers) for kind, p in layer.named_parameters()}
    ranks = pool.run(2, every, 2)
    for name in GENERATORS:
        assert sum(rank[name][0] for rank in ranks) == pytest.approx(loss.item())
        grads = {key: grad for rank in ranks for key, grad in rank[name][1].items()}
        assert grads.keys() == expected.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-12, atol=1e-12, msg=f"{name} {key}")


def test_a_table_that_torch_reads() -> None:
    """Its own parser takes every cell."""
    from torch.distributed.pipelining.schedules import _Action

    for name in ("1f1b", "zbv", "interleaved-zb"):
        for line in to_csv(schedule_for(name, 4, 8)).splitlines():
            for cell in line.split(","):
                assert str(_Action.from_str(cell)) == cell


def test_what_is_no_pipeline_is_an_error_with_the_numbers() -> None:
    """A schedule of other ranks; a shape in the place of a boundary."""
    wrong = {(4, TensorMeta((3, 6), torch.float64)): "of 4 ranks, but .* has 2", (2, (3, 6)): "say a TensorMeta"}
    with ParallelState.inspect(Layout.of(pp=2), 0) as state:
        for (ranks, boundary), words in wrong.items():
            with pytest.raises(ValueError, match=words):
                Pipeline(lambda n: Layers(n, 4), schedule_for("1f1b", ranks, M), state.axis("pp"), boundary)  # type: ignore[arg-type]
