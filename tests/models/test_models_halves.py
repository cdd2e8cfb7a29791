"""A microbatch in two halves is the same microbatch, and the messages of one pass while the other computes.

Faults to catch: a half that has the positions of the other's rows; halves joined in the wrong order; outputs that begin
their way back behind the other half's experts; rows that are sent when the other half is through with its experts;
outputs that begin their way back behind a rank's own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stretto.arguments.schema import ModelConfig
from stretto.attention import causal_attention
from stretto.attention.tile import tile_kernel
from stretto.batch import Batch
from stretto.context_parallel import ContextAttention
from stretto.experts import grouped
from stretto.experts.axes import expert_axes
from stretto.experts.dispatch import Dispatch, Message
from stretto.layout import Layout
from stretto.models import Microbatch, StageSpec, Transformer
from stretto.models.attention import SelfAttention
from stretto.parallel_state import ParallelState, default_axes
from stretto.params import collect, fill
from stretto.structure import SequenceCut
from stretto.tensor_parallel import Build
from stretto.testing import Pool
from stretto.world import Axis, ExpertAxes, World

pytestmark = pytest.mark.gloo

SEQ, VOCAB = 12, 53
SPARSE: dict[str, Any] = {"experts": 4, "top_k": 2, "expert_ffn": 16, "balance_loss": 0.05, "router_z_loss": 0.01}
KINDS: list[dict[str, Any]] = [
    {},
    {"shared_ffn": 8, "shared_gate": True, "sparse_every": 2},
    {"position": "learned", "norm": "layer", "bias": True, "activation": "gelu", "first_dense": 1},
    {"norm_placement": "both", "qk_norm": True, "window": 4},
    {"expert_capacity": 1.0, "parallel_residual": True},
]


def config_of(kind: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        layers=3, hidden=24, heads=4, kv_heads=2, head_dim=6, ffn=32, vocab=VOCAB, dropout=0.2, **SPARSE, **kind
    )


def loss_and_gradients(
    config: ModelConfig, batch: Batch, *, halves: bool, experts: ExpertAxes | None = None
) -> list[Tensor]:
    axes = ExpertAxes.single() if experts is None else experts
    build = Build(Axis.single("tp"), False, torch.float64, seed=3, tokens=batch.tokens.numel(), experts=axes)
    alone = Axis.single("cp")
    attend = ContextAttention(causal_attention, tile_kernel(torch.device("cpu")), alone, alone, "all-gather")
    model = Transformer(config, StageSpec.whole(config), build, seq_len=SEQ, halves=halves, attend=lambda _: attend)
    fill(collect(model), 7, lambda p: p.data)
    cut, structure = SequenceCut().of(batch)
    loss = model(None, Microbatch(cut, batch.loss_mask.sum().double(), structure))
    loss.backward()
    return [loss.detach(), *(p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters())]


def batch_of(rows: int, starts: Tensor | None) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(VOCAB, (rows, SEQ + 1), generator=generator)
    mask = torch.rand(rows, SEQ, generator=generator) < 0.8
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.arange(rows) + 5, starts)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from([2, 4]), st.none() | st.integers(0, 9))
def test_halves_are_the_whole(kind: dict[str, Any], rows: int, documents: int | None) -> None:
    """Loss and gradients, with documents in the rows and without, of every kind of block."""
    starts = None
    if documents is not None:
        cuts = torch.rand(rows, SEQ, generator=torch.Generator().manual_seed(documents)) < 0.3
        starts = torch.where(cuts, torch.arange(SEQ), 0).cummax(1).values
    batch, config = batch_of(rows, starts), config_of(kind)
    for whole, halved in zip(*(loss_and_gradients(config, batch, halves=h) for h in (False, True)), strict=True):
        torch.testing.assert_close(halved, whole, rtol=1e-10, atol=1e-12)


Event = tuple[str, str, int]


def events(world: World, halves: bool) -> list[Event]:
    """What happens in forward and backward of a rank, in order: what is begun, what is taken, what computes; messages
    with the number of their dispatch."""
    seen: list[Event] = []
    known: list[Dispatch] = []

    def number(dispatch: Dispatch) -> int:
        if dispatch not in known:
            known.append(dispatch)
        return known.index(dispatch)

    def ready(self: Dispatch, name: str, value: object) -> None:
        """As a device sees it rows travel from when they lie ready, beside what came since."""
        if value is not None and name == "leaving":
            seen.append(("begin", "tokens", number(self)))
        object.__setattr__(self, name, value)

    def begins(way: Callable[..., None]) -> Callable[..., None]:
        def call(self: Dispatch, message: Message, rows: Tensor, *order: Any) -> None:
            if message != "tokens":
                seen.append(("begin", message, number(self)))
            way(self, message, rows, *order)

        return call

    def taken(self: Dispatch, message: Message) -> Tensor:
        seen.append(("take", message, number(self)))
        return take(self, message)

    def computes(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(("compute", function.__name__, 0))
            y = function(*args, **kwargs)
            if isinstance(y, Tensor) and y.requires_grad:
                y.register_hook(lambda _: seen.append(("compute", function.__name__, 0)))
            return y

        return call

    take = Dispatch.taken
    noted = {"__setattr__": ready, "there": begins(Dispatch.there), "back": begins(Dispatch.back), "taken": taken}
    layout = Layout.of(dp=2, ep=2)
    with (
        mock.patch.multiple(Dispatch, **noted),
        mock.patch.object(SelfAttention, "_attended", computes(SelfAttention._attended)),
        mock.patch.object(grouped, "multiply", computes(grouped.multiply)),
        ParallelState.build(layout, world, axes=default_axes(layout, experts=True)) as state,
    ):
        loss_and_gradients(config_of({}), batch_of(2, None), halves=halves, experts=expert_axes(state))
    return seen


def exposed(seen: list[Event], *messages: Message) -> float:
    """The share of these messages between whose begin and end nothing computes."""
    alone = []
    for at, (what, message, of) in enumerate(seen):
        if what == "begin" and message in messages:
            between = seen[at : seen.index(("take", message, of), at)]
            alone.append(all(kind != "compute" for kind, _, _ in between))
    return sum(alone) / len(alone)


ROWS: tuple[Message, ...] = ("tokens", "outputs", "dout", "drows")


def test_messages_pass_while_own_rows_are_computed(pool: Pool) -> None:
    """Every message of tokens or rows has a GEMM behind it, without halves."""
    for seen in pool.run(2, events, False):
        assert exposed(seen, *ROWS) == 0


def test_messages_pass_while_the_other_half_computes(pool: Pool) -> None:
    """The other half attends, or its experts compute, while any of them is under way."""
    for seen in pool.run(2, events, True):
        assert exposed(seen, *ROWS) == 0
        assert any(
            ("compute", "_attended", 0) in seen[at : seen.index(("take", message, of), at)]
            for at, (what, message, of) in enumerate(seen)
            if what == "begin" and message == "tokens"
        )
