"""The inspection API: whole tensors under Hugging Face names, whatever the layout; several layouts at once."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from test_verify_layouts import arguments
from torch import Tensor

from stretto.arguments import ConfigError, parse
from stretto.arguments.schema import Arguments
from stretto.layout import Layout
from stretto.params import ParamSpec
from stretto.testing import Pool
from stretto.verify import against_reference, build, random_batch, random_weights
from stretto.verify.activations import WIDTH
from stretto.verify.compare import TOLERANCE, UPDATE_SLACK, differences, trace
from stretto.verify.reference import limit_of, perturbed
from stretto.world import World

pytestmark = pytest.mark.gloo

TIED, BIAS = 1, 2


def _full(world: World, args: Arguments, layout: Layout) -> dict[str, dict[str, Tensor]]:
    """Everything whole, after one step from random weights."""
    with build(args, layout, world) as session:
        session.load_full(random_weights(session, 0))
        session.step(random_batch(args, 1))
        return {
            "params": session.full_params(),
            "grads": session.full_grads(),
            "optimizer": session.full_optimizer(),
        }


def test_whole_tensors_have_hugging_face_names_and_no_padding(pool: Pool) -> None:
    """q, k, v, gate and up apart, layers by global number, a vocabulary of 53 of which two ranks store 64 rows."""
    args = arguments(2, 2, 1, variant=0)
    full = pool.run(4, _full, args, Layout.of(tp=2, pp=2))[0]
    expected = {"model.embed_tokens.weight": (53, 24), "model.norm.weight": (24,), "lm_head.weight": (53, 24)}
    for n in range(5):
        layer = f"model.layers.{n}"
        expected |= {
            f"{layer}.input_layernorm.weight": (24,),
            f"{layer}.self_attn.q_proj.weight": (24, 24),
            f"{layer}.self_attn.k_proj.weight": (12, 24),
            f"{layer}.self_attn.v_proj.weight": (12, 24),
            f"{layer}.self_attn.o_proj.weight": (24, 24),
            f"{layer}.post_attention_layernorm.weight": (24,),
            f"{layer}.mlp.gate_proj.weight": (8, 24),
            f"{layer}.mlp.up_proj.weight": (8, 24),
            f"{layer}.mlp.down_proj.weight": (24, 8),
        }
    for kind in ("params", "grads"):
        assert {name: tuple(t.shape) for name, t in full[kind].items()} == expected, kind
    moments = {f"{m}/{name}" for m in ("exp_avg", "exp_avg_sq") for name in expected}
    assert set(full["optimizer"]) == moments
    assert all(t.isfinite().all() for tensors in full.values() for t in tensors.values())


def test_gradients_are_those_before_clipping(pool: Pool) -> None:
    """Their norm is the one that the step reports, far above the limit of 0.5 that is then clipped to."""
    args = arguments(2, 1, 1, variant=0)
    norm, grads = pool.run(2, _norm_and_grads, args)[0]
    assert norm > args.optimizer.clip_grad
    total = torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt().item()
    assert norm == pytest.approx(total, rel=1e-12)


def _norm_and_grads(world: World, args: Arguments) -> tuple[float, dict[str, Tensor]]:
    with build(args, Layout.of(tp=2), world) as session:
        session.load_full(random_weights(session, 0))
        _, norm = session.step(random_batch(args, 1))
        return norm, session.full_grads()


def _loaded(world: World, args: Arguments) -> bool:
    with build(args, Layout.of(tp=2), world) as session:
        weights = random_weights(session, 3)
        session.step(random_batch(args, 1))
        session.load_full(weights)
        back, moments = session.full_params(), session.full_optimizer()
        return all(torch.equal(back[n], weights[n]) for n in weights) and not any(t.any() for t in moments.values())


def test_loading_is_bitwise_and_forgets_the_moments(pool: Pool) -> None:
    assert all(pool.run(2, _loaded, arguments(2, 1, 1, variant=TIED)))


def _missing(world: World, args: Arguments) -> None:
    with build(args, Layout.of(), world) as session:
        weights = session.full_params()
        del weights["model.norm.weight"]
        session.load_full(weights)


def test_a_missing_tensor_is_named(pool: Pool) -> None:
    with pytest.raises(KeyError, match=r"model\.norm\.weight"):
        pool.run(1, _missing, arguments(1, 1, 1, variant=0))


def _local(world: World, args: Arguments, layout: Layout) -> tuple[dict[str, tuple[tuple[int, ...], ParamSpec]], dict]:  # type: ignore[type-arg]
    with build(args, layout, world) as session:
        return {name: (tuple(t.shape), spec) for name, t, spec in session.local_params()}, session.groups()


def test_local_parameters_come_with_their_specs_and_ranks_with_their_groups(pool: Pool) -> None:
    """Rank 1 of tp=2 x pp=2 has half the columns of o_proj, the rest of the vocabulary, and two groups."""
    ranks = pool.run(4, _local, arguments(2, 2, 1, variant=TIED + BIAS), Layout.of(tp=2, pp=2))
    local, groups = ranks[1]
    shape, spec = local["model.layers.0.self_attn.o_proj.weight"]
    assert (shape, spec.shape) == ((24, 12), (24, 24))
    assert [(s.axis, s.dim) for s in spec.shard] == [("tp", 1)]
    assert local["model.embed_tokens.weight"][0] == (21, 24)  # 53 = 32 + 21
    assert local["model.embed_tokens.weight"][1].sum_grad == ("embed",)
    assert groups == {"tp": (0, 1), "pp": (1, 3), "embed": (1, 3)}


def _side_by_side(world: World, args: Arguments) -> tuple[list[float], bool]:
    """Three layouts of one world alive at once, taking turns."""
    batches = [random_batch(args, k) for k in range(2)]
    layouts = (Layout.of(tp=2), Layout.of(dp=2), Layout.of(pp=2))
    with (
        build(args, layouts[0], world) as one,
        build(args, layouts[1], world) as two,
        build(args, layouts[2], world) as three,
    ):
        weights = random_weights(one, 0)
        sessions = (one, two, three)
        for session in sessions:
            session.load_full(weights)
        losses = [session.step(batch)[0] for batch in batches for session in sessions]
        full = [session.full_params() for session in sessions]
    return losses, all(torch.allclose(f[n], full[0][n], rtol=0, atol=1e-12) for f in full for n in weights)


def test_layouts_live_side_by_side_in_one_process(pool: Pool) -> None:
    """P8: groups, buckets and hooks of one know nothing of the others'."""
    args = arguments(2, 1, 2, variant=0)
    for losses, same in pool.run(2, _side_by_side, args):
        assert same
        assert losses[0] != losses[3]
        assert losses[:3] == pytest.approx([losses[0]] * 3, rel=1e-12)
        assert losses[3:] == pytest.approx([losses[3]] * 3, rel=1e-12)


def _watched(world: World, args: Arguments) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    with build(args, Layout.of(tp=2, pp=2), world) as session:
        session.load_full(random_weights(session, 0))
        session.step(random_batch(args, 1), observe=True)
        return list(session.seen.outputs), dict(session.seen.outputs), dict(session.seen.gradients)


def test_a_watched_step_sees_every_module_once_in_forward_order(pool: Pool) -> None:
    """Also across the stages of a pipeline; each row of the global batch has its projections."""
    args = arguments(2, 2, 1, variant=0)
    names, outputs, gradients = pool.run(4, _watched, args)[3]
    inside = [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    layers = [f"model.layers.{n}{part}" for n in range(5) for part in (*(f".{i}" for i in inside), "")]
    assert names == ["model.embed_tokens", *layers, "model.norm"]
    assert set(gradients) == set(outputs)
    assert all(x.shape == (args.batch.global_batch, WIDTH) for x in (*outputs.values(), *gradients.values()))
    # The last row is masked altogether, so no gradient comes from it.
    assert all((g[-1] == 0).all() and g[0].any() for g in gradients.values())


def test_nudged_weights_are_the_same_but_for_what_bf16_cannot_hold() -> None:
    """Catches weights that stay as they are, all round as before, or are other ones; and a zero that is none."""
    weights = {"w": torch.randn(4000, generator=torch.Generator().manual_seed(0)), "zero": torch.zeros(3)}
    moved, again = perturbed(weights, 2.0**-8, 1), perturbed(weights, 2.0**-8, 2)
    assert not moved["zero"].any()
    last_place = 2.0 ** weights["w"].abs().log2().floor() / 128  # 7 bits follow the first
    assert ((moved["w"] - weights["w"]).abs() <= last_place / 7.9).all()
    elsewhere = moved["w"].bfloat16() != weights["w"].bfloat16()
    assert 0.02 < elsewhere.double().mean() < 0.12
    assert not torch.equal(moved["w"].bfloat16(), again["w"].bfloat16())


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_that_the_model_does_not_have_are_an_error(tied: bool) -> None:
    """A tied head in silence left out would pass for loaded."""
    args = arguments(1, 1, 1, variant=TIED if tied else 0)
    with build(args, Layout.of(), World.single()) as session:
        weights = random_weights(session, 0)
        name = "lm_head.weight" if tied else "model.layers.5.mlp.up_proj.weight"
        with pytest.raises(KeyError, match=f"the model has no tensor {name}"):
            session.load_full({**weights, name: torch.zeros(1)})


def test_a_batch_that_does_not_fit_is_an_error() -> None:
    """Over tp a token outside the vocabulary would look up zeros; a row too many would be waited for."""
    args = arguments(1, 1, 1, variant=0)
    vocab, rows = args.model.vocab_size, args.batch.global_batch
    with build(args, Layout.of(), World.single()) as session:
        good = random_batch(args, 1)
        for field in ("tokens", "labels"):
            for wrong in (vocab, -1):
                ids = getattr(good, field).clone()
                ids[0, 0] = wrong
                with pytest.raises(ValueError, match=f"{field} has ids from .*vocabulary has 0 to {vocab - 1}"):
                    session.step(replace(good, **{field: ids}))
        with pytest.raises(ValueError, match=f"{rows - 1} rows for a global batch of {rows}"):
            session.step(good.rows(slice(0, rows - 1)))


def test_arguments_that_break_a_rule_in_the_layout_are_an_error() -> None:
    args = arguments(1, 1, 1, variant=0)
    with pytest.raises(ConfigError, match="tp"), build(args, Layout.of(tp=3), World.single()):
        pass


def test_what_is_looked_at_is_no_graph() -> None:
    """On a GPU a run replays its microbatches: from other tensors, without its modules being called."""
    args = parse(["--preset", "tiny", "--device", "cuda", "--nproc", "1"], env={}, files=False).args
    assert args.run.cuda_graphs
    with mock.patch("stretto.verify.session.build_run") as made, build(args, Layout.of(), World.single()):
        assert made.call_args[0][0].run.cuda_graphs is False


@pytest.mark.parametrize("rule", ["sgd", "lion", "muon"])
def test_every_update_rule_can_be_compared(rule: str) -> None:
    """An eps for rules that have none, which no run may be given, ended each of these with a ConfigError."""
    args = arguments(1, 1, 1, variant=0)
    args = replace(args, optimizer=replace(args.optimizer, optimizer=rule, eps=1e-8))
    found = against_reference(args, Layout.of(), World.single())
    assert found.equal
    assert {d.quantity.step for d in found.of("update")} == {1, 2}


def test_moments_in_bf16_may_round_to_either_side() -> None:
    """Two right runs, here from weights 2^-20 apart, exceed the limit of all other updates."""
    args = arguments(1, 1, 1, variant=0)
    args = replace(
        args, optimizer=replace(args.optimizer, moments="bf16", clip_grad=0.0), run=replace(args.run, dtype="fp32")
    )
    with build(args, Layout.of(), World.single()) as session:
        weights, batches = random_weights(session, 0), [random_batch(args, n) for n in (1, 2)]
        one, other = (trace(session, start, batches) for start in (weights, perturbed(weights, 2**-18, 0)))
    found = differences(one, other)
    first, second = (
        max(
            (error, limit_of(q, args, exactly=False))
            for q, error in found.items()
            if q.kind == "update" and q.step == step
        )
        for step in (1, 2)
    )
    assert first[0] < first[1] == TOLERANCE["fp32"] * UPDATE_SLACK < second[0] < second[1]


def test_a_budget_is_that_of_the_layout_compared() -> None:
    """No reference is held to a rank's budget, and modules that only one run puts out are no error."""
    args = arguments(1, 1, 1, variant=0)
    args = replace(args, run=replace(args.run, activation_budget="20KB"))
    found = against_reference(args, Layout.of(), World.single())
    assert found.equal
    norms = [d.quantity.of for d in found.of("activation") if d.quantity.of.endswith("input_layernorm")]
    assert norms == [f"model.layers.{n}.input_layernorm" for n in (2, 3, 4)]
