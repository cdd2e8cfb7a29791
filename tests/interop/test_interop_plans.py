"""Plans of models whose matrices are fused, transposed or stacked: cut over tp they stay what they were.

Faults to catch: queries, keys and values cut as one; a rank that splits them as if it had all; experts whose inputs
lack other ranks' share of the gradient; weights of experts that lack it; a sequence that is gathered and counted by
every rank; embeddings that are not scaled; a norm whose output is not gathered; the columns of a stack written as one;
features of padding that count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interop_oracle import build, in_fp64, rows
from test_interop_parallelize import TP, compare
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.checkpoint import latest_complete
from stretto.distributed.shard import shard
from stretto.interop.plans import plan_of
from stretto.interop.suggest import suggested
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import slices
from stretto.schedule.sharding import MODES
from stretto.tensor_parallel.foreign import parallelize
from stretto.tensor_parallel.foreign_layers import Colwise
from stretto.testing import Pool
from stretto.train.optimizers import Muon
from stretto.train.record import Listener, StepRecord
from stretto.train.trainer import Trainer
from stretto.verify import gather_full
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

COMMIT = {
    2: (("gpt2", True), ("phi3", False), ("mixtral", True), ("gemma2", True)),
    4: (("qwen2_moe", False), ("gemma3", True), ("gpt2", False)),
}
NIGHT = {
    2: (("gemma", False), ("phi3", True), ("phi4-mini", True), ("mixtral", False), ("gemma2", False)),
    4: (("qwen2_moe", True), ("qwen3_moe", True), ("qwen3_moe", False), ("gemma", True), ("mixtral", True)),
}


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("families", [COMMIT, pytest.param(NIGHT, marks=pytest.mark.nightly)], ids=["few", "more"])
def test_models_stay_what_they_are(pool: Pool, tp: int, families: dict[int, tuple[tuple[str, bool], ...]]) -> None:
    """Outputs, gradients and updates in fp64; on four ranks a third of 20 inner features is padded, or 12 are not."""
    pool.run(tp, _families, families[tp], timeout=120)


def _families(world: World, families: tuple[tuple[str, bool], ...]) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        for family, sequence_parallel in families:
            compare(family, state, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_losses_of_balance_and_single_tokens_stay_what_they_are(pool: Pool, sequence_parallel: bool) -> None:
    """A router gets gradients from its tokens' experts and from the auxiliary loss; logits are of the last tokens."""
    pool.run(2, _balance, sequence_parallel, timeout=120)


def _balance(world: World, sequence_parallel: bool) -> None:
    with ParallelState.build(Layout.of(tp=2), world) as state:
        tp, plain, model = state.axis("tp"), build("mixtral"), build("mixtral")
        parallelize(model, plan_of(model, tp, sequence_parallel=sequence_parallel), tp)
        tokens, _, _ = rows()
        with shard(model, state, sharding="none") as sharded:
            found = []
            for each in (plain, model):
                with in_fp64():
                    out = each(tokens, use_cache=False, output_router_logits=True, logits_to_keep=3)
                    (out.logits.square().mean() + out.aux_loss).backward()
                found.append(out.logits.detach())
            sharded.finish()
            assert found[1].shape == (tokens.shape[0], 3, plain.config.vocab_size)
            torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
            parts = slices(sharded.declared, lambda p: sharded.part(p, lambda b: b.grad), sharded.position())
            full = gather_full(parts, tp)
        for name, param in plain.named_parameters():
            if param.grad is not None:
                torch.testing.assert_close(full[name], param.grad, rtol=1e-9, atol=1e-11)


class Losses(Listener):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def stepped(self, record: StepRecord) -> None:
        self.losses.append(record.loss)


def _batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(53, (8, 9), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def _loss(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())


def _train(world: World, family: str, layout: Layout, out: Path) -> list[float]:
    """Updates by Muon, which looks at whole matrices."""
    heard = Losses()
    with ParallelState.build(layout, world) as state:
        tp, model = state.axis("tp"), build(family)
        model.config.use_cache = False
        parallelize(model, plan_of(model, tp), tp)
        said = {"data": _batch, "loss": _loss, "lr": 1e-2, "global_batch": 8, "micro_batch": 2, "dtype": torch.float64}
        sharding = MODES["fsdp" if world.size > 1 else "none"]
        more = {"optimizer": Muon(), "sharding": sharding, "out": out, "save_every": 2}
        with Trainer(model, state, **said, **more) as trainer:
            trainer.fit(2, [heard])
    return heard.losses


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("family", ["gpt2", pytest.param("qwen3_moe", marks=pytest.mark.nightly)])
def test_the_trainer_takes_them_and_saves_whole_tensors_under_their_names(
    pool: Pool, tmp_path: Path, family: str
) -> None:
    """Over tp and sharded over dp as in one process: losses, and the weights that torch reads from the checkpoint."""
    alone = pool.run(1, _train, family, Layout.of(), tmp_path / "1", timeout=120)[0]
    cut = pool.run(4, _train, family, Layout.of(tp=2, dp=2), tmp_path / "4", timeout=120)[0]
    assert cut == pytest.approx(alone, rel=1e-6)
    one, four = (_saved(tmp_path / name) for name in ("1", "4"))
    assert one.keys() == four.keys() == dict(build(family).named_parameters()).keys()
    for name, want in one.items():
        torch.testing.assert_close(four[name], want, rtol=1e-5, atol=1e-6)


def _saved(out: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    newest = latest_complete(out / "checkpoints")
    assert newest is not None
    reader = FileSystemReader(newest.path)
    known = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if name.startswith("model/") and isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model/"): tensor for name, tensor in state.items()}


def test_an_unknown_family_is_told_a_plan_of_its_own_names_that_holds(pool: Pool) -> None:
    opt = _opt()
    with pytest.raises(ValueError, match="no plan for OPTForCausalLM of model_type opt") as said:
        plan_of(opt, TP)
    plan = '"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"'
    for words in (plan, '"lm_head": "vocab", "*": "replicated"', r"model.decoder.layers.*.self_attn.q_proj: Linear"):
        assert words in str(said.value)
    pool.run(2, _suggested, timeout=120)


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "ffn_dim": 22, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 53}
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, dropout=0.0, max_position_embeddings=32)).double()


def _suggested(world: World) -> None:
    with ParallelState.build(Layout.of(tp=2), world) as state:
        tokens, _, _ = rows()
        model, tp = _opt(), state.axis("tp")
        want = model(tokens, use_cache=False).logits
        parallelize(model, suggested(model), tp)
        torch.testing.assert_close(model(tokens, use_cache=False).logits, want, rtol=1e-10, atol=1e-10)


class Odd(nn.Module):
    """Experts whose matrices are turned."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 4, 12))
        self.down_proj = nn.Parameter(torch.zeros(3, 6, 4))


def test_what_has_no_plan_is_rejected_with_a_way_out() -> None:
    from stretto.tensor_parallel.foreign_layers import Experts

    with pytest.raises(ValueError, match="2 key/value heads in one matrix with the queries over tp=4 ranks"):
        plan_of(build("phi3"), TP)
    with pytest.raises(ValueError, match=r"holds gate_up_proj \[3, 4, 12\], .*\"replicated\" to keep them whole"):
        parallelize(Odd(), {"": Experts()}, TP)
    linear = nn.Sequential(nn.Linear(4, 12))
    with pytest.raises(ValueError, match=r"sections \(6, 7\) of 12 rows must add up"):
        parallelize(linear, {"0": Colwise(sections=(6, 7)), "*": "replicated"}, TP)
    with pytest.raises(ValueError, match="0: 2 \\+ 1 \\+ 1 heads over tp=2 ranks"):
        parallelize(linear, {"0": Colwise(4, sections=(6, 3, 3)), "*": "replicated"}, Axis("tp", 0, (0, 1)))
    jitter = build("mixtral")
    jitter.model.layers[0].mlp.jitter_noise = 0.1
    with pytest.raises(ValueError, match=r"mlp.jitter_noise = 0.1: torch draws noise from where a rank is"):
        parallelize(jitter, plan_of(jitter, TP), TP)


class Shifted(nn.Module):
    """Seven inner features, and an activation that is not 0 at 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 7, dtype=torch.float64), nn.Linear(7, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.sigmoid(self.up(x)))
        return y


def test_features_of_padding_take_no_part_whatever_an_activation_makes_of_them(pool: Pool) -> None:
    """Seven features on four ranks; what padding has would come in with the second update."""
    pool.run(4, _shifted)


def _shifted(world: World) -> None:
    with ParallelState.build(Layout.of(tp=4), world) as state:
        plain, model = Shifted(), Shifted()
        parallelize(model, {"up": "colwise", "down": "rowwise", "": "replicated"}, state.axis("tp"))
        x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
            for each in (plain, model):
                each.zero_grad()
                each(x).square().sum().backward()
                with torch.no_grad():
                    for param in each.parameters():
                        param -= 0.1 * (torch.zeros_like(param) if param.grad is None else param.grad)
