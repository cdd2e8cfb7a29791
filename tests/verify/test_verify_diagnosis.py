"""P24: where two layouts differ, the first module, the parameter and the rule that governs it are named.

Each fault is one that has cost somebody weeks. It is put in by a patch inside the workers, for one run; without it the
same run is equal (`test_verify_layouts`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from rich.console import Console
from test_verify_layouts import arguments
from torch import Tensor
from torch.nn import functional as F

from stretto.arguments.schema import Arguments, TuningConfig
from stretto.distributed import bucket, data_parallel
from stretto.layout import Layout
from stretto.models import block, norm
from stretto.params import Init, ParamSpec
from stretto.report.comparison import as_data, comparison
from stretto.tensor_parallel import RowParallelLinear, mappings
from stretto.testing import Pool
from stretto.train import step
from stretto.verify import Comparison, against_reference, places, where_to_look
from stretto.world import Done, World

pytestmark = pytest.mark.gloo

SEQUENCE_PARALLEL, BIAS = 64, 2


def _bias_in_every_part(self: RowParallelLinear, x: Tensor, *_: Any) -> Tensor:
    return mappings.leave(
        F.linear(x, self.weight, self.bias), self.build.tp, sequence_parallel=self.build.sequence_parallel
    )


def _third_layer_louder(self: block.Block, x: Tensor, rotations: Any, structure: Any, *_: Any) -> Tensor:
    x = x + self.self_attn(self.input_layernorm(x).output, rotations.whole, structure)
    more = self.mlp(self.post_attention_layernorm(x).output)
    return x + more * (1.0 + 1e-6 * self.self_attn.qkv_proj.build.tp.rank)


def _whole_on_each_rank(shape: tuple[int, ...], init: Init, **_: Any) -> ParamSpec:
    return ParamSpec(shape, init, weight_decay=False)


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bias before the sum": lambda: mock.patch.object(RowParallelLinear, "forward", _bias_in_every_part),
    "one rank off by a millionth": lambda: mock.patch.object(block.Block, "forward", _third_layer_louder),
    "no sum on the way back": lambda: mock.patch.object(
        mappings._CopyTo, "backward", staticmethod(lambda _, dy: (dy, None, None))
    ),
    "parts not declared": lambda: mock.patch.object(norm, "replicated", _whole_on_each_rank),
    "parts not summed": lambda: mock.patch.object(data_parallel, "sum_partial_gradients"),
    "replicas not reduced": lambda: mock.patch.object(bucket, "all_reduce_", return_value=Done()),
    "norm of this rank alone": lambda: mock.patch.object(step, "grad_norm", _twice(step.grad_norm)),
    "evaluation off": lambda: mock.patch("stretto.verify.session.evaluate", _twice(step.evaluate)),
}


def _twice(measure: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A measure that is wrong on worlds of more than one rank."""

    def wrong(first: Any, *rest: Any) -> Tensor:
        state = rest[-1] if rest else first.state
        return measure(first, *rest) * state.world.size

    return wrong


def _compare(world: World, args: Arguments, fault: str) -> Comparison:
    p = args.parallel
    with FAULTS[fault]():
        return against_reference(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world, steps=1)


def found_with(pool: Pool, fault: str, sizes: tuple[int, int, int], variant: int) -> tuple[Comparison, str]:
    """The comparison of a faulty run of (tp, pp, dp), and where it says to look; all ranks find the same."""
    args = arguments(*sizes, variant=variant)
    found, *others = pool.run(sizes[0] * sizes[1] * sizes[2], _compare, args, fault)
    assert all(other.differences == found.differences for other in others)
    assert not found.equal
    with FAULTS[fault]():  # what a parameter's declaration says is read from the faulty model
        return found, " ".join(where_to_look(found, args, places(args)))


def first(found: Comparison, kind: Any) -> str | None:
    difference, _ = found.first(kind)
    return None if difference is None else difference.quantity.of


@pytest.mark.parametrize("pp", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_a_wrong_forward_names_its_first_module_and_collective(pool: Pool, pp: int) -> None:
    """Activations before it are equal, whatever stage and rank they are on."""
    found, look = found_with(pool, "bias before the sum", (2, pp, 1), BIAS)
    assert first(found, "activation") == "model.layers.0.self_attn.o_proj"
    assert "RowParallelLinear" in look
    assert "reduce_from" in look


def test_one_rank_that_is_off_by_little_is_seen(pool: Pool) -> None:
    """The ranks that repeat an activation are averaged, so one that has another shows."""
    found, look = found_with(pool, "one rank off by a millionth", (2, 1, 1), 0)
    assert first(found, "activation") == "model.layers.0"
    assert "up to model.layers.0.mlp.down_proj" in look


def test_a_wrong_backward_names_the_module_whose_backward_it_is(pool: Pool) -> None:
    """Forward all is right; the gradient that leaves the head is half of what it should be."""
    found, look = found_with(pool, "no sum on the way back", (2, 1, 1), 0)
    assert first(found, "activation") is None
    assert first(found, "activation gradient") == "model.norm"
    assert "lm_head is a VocabParallelHead" in look
    assert "copy_to" in look


def test_a_part_of_a_gradient_names_the_parameters_and_their_spec(pool: Pool) -> None:
    """Under sequence parallelism the norms, and nothing else, lack the sum."""
    found, look = found_with(pool, "parts not summed", (2, 1, 1), SEQUENCE_PARALLEL)
    assert first(found, "activation gradient") is None
    wrong = {d.quantity.of for d in found.of("gradient") if d.exceeds and d.quantity.step == 1}
    assert wrong
    assert all("norm" in name for name in wrong), wrong
    assert "a part on each rank of tp=2" in look
    assert "partial.py" in look
    assert found.unequal


def test_a_part_of_a_gradient_that_no_spec_declares_is_told_from_its_replicas(pool: Pool) -> None:
    """Each rank then steps by the part of its own tokens; what is declared says nothing of it."""
    found, look = found_with(pool, "parts not declared", (2, 1, 1), SEQUENCE_PARALLEL)
    assert "nobody sums it. Yet its replicas differ" in look
    assert "sum_grad of its ParamSpec must name tp" in look
    assert any("norm" in name for name in found.unequal)


def test_a_gradient_that_is_not_reduced_names_the_axis(pool: Pool) -> None:
    """Each rank then has its own share of the batch only."""
    found, look = found_with(pool, "replicas not reduced", (1, 1, 2), 0)
    assert "summed over dp=2 by Bucket" in look
    assert any("embed_tokens" in name for name in found.unequal)


def test_a_wrong_norm_says_how_many_times_too_large(pool: Pool) -> None:
    """Gradients are right, so only the norm can be."""
    _, look = found_with(pool, "norm of this rank alone", (2, 1, 1), 0)
    assert "not their norm (it is 2 times what it should be)" in look


def test_a_wrong_evaluation_is_told_from_a_wrong_step(pool: Pool) -> None:
    _, look = found_with(pool, "evaluation off", (1, 2, 1), 0)
    assert "not the evaluation (it is 2 times what it should be)" in look


def test_the_table_fits_eighty_columns_and_the_file_has_everything(pool: Pool) -> None:
    """No line is cut; what a program reads is plain JSON, also where an error is no number."""
    args = arguments(2, 1, 1, variant=SEQUENCE_PARALLEL)
    found, _ = found_with(pool, "parts not summed", (2, 1, 1), SEQUENCE_PARALLEL)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison(found, args, Layout.of()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "DIFFERENT" in text
    assert "✗ weight gradients" in text
    data = json.loads(json.dumps(as_data(found, args, Layout.of()), allow_nan=False))
    assert not data["equal"]
    assert data["layout"]["tp"] == 2
    assert data["first_forward"] is None
    assert len(data["differences"]) == len(found.differences)
    long = "model.layers.1.post_attention_layernorm.weight"
    named = [replace(d, quantity=d.quantity._replace(of=long)) for d in found.differences]
    console.print(comparison(replace(found, differences=named), args, Layout.of()))
    assert all("post_attention_layernorm" in line for line in console.export_text().splitlines() if "…" in line)


def test_the_table_has_what_is_frozen(pool: Pool) -> None:
    """Where little else is trained. Catches a row that wants a gradient of it."""
    args = replace(arguments(2, 1, 1, variant=0), tuning=TuningConfig(freeze=("model.layers.*", "model.embed_*")))
    found = pool.run(2, _compare_layouts, args, Layout.of())[0]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison(found, args, Layout.of()))
    assert "model.layers.0.input_layernorm.weight" in console.export_text()


def _compare_layouts(world: World, args: Arguments, reference: Layout) -> Comparison:
    p = args.parallel
    layout = Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1)
    return against_reference(args, layout, world, reference=reference, steps=1)


@pytest.mark.parametrize(
    "reference", [pytest.param(Layout.of(pp=2), marks=pytest.mark.nightly), Layout.of(tp=2, pp=2)], ids=str
)
def test_any_layout_can_be_the_reference_in_the_same_world(pool: Pool, reference: Layout) -> None:
    """P8: it runs on the first ranks of the world while the other layout lives on all of them."""
    for found in pool.run(4, _compare_layouts, arguments(2, 1, 2, variant=SEQUENCE_PARALLEL + 16), reference):
        assert found.equal, [d.name for d in found.failures[:4]]


def test_a_reference_that_does_not_fit_is_rejected(pool: Pool) -> None:
    with pytest.raises(ValueError, match="4 ranks does not fit into a world of 2"):
        pool.run(2, _compare_layouts, arguments(2, 1, 1, variant=0), Layout.of(dp=4))
