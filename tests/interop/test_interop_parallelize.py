"""Models of transformers over tensor-parallel ranks: outputs, gradients and updates are those of the untouched model.

Faults to catch: key/value heads in copies whose parts of the gradient are not summed; a rank that reads too many heads;
norms of a head whose parts are not summed; norms on a part of the sequence whose parts are not summed; logits whose
gradient every rank adds; a bias added on every rank; values of another rank's random draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from interop_oracle import build, in_fp64, rows
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.distributed.shard import shard
from stretto.interop.plans import plan_of
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import slices
from stretto.tensor_parallel import vocab_parallel_cross_entropy
from stretto.tensor_parallel.foreign import Plan, parallelize
from stretto.tensor_parallel.foreign_layers import Around, Colwise, Replicated, Rowwise
from stretto.testing import Pool
from stretto.train.optimizers import AdamW
from stretto.verify import gather_full
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

FAMILIES = {
    2: ("llama-biased", "gpt_neox", "qwen3", "mistral", "granite"),
    4: ("qwen3", "qwen2-windows", "pythia-sequential", "llama3", "seed_oss", "helium"),
}
TP = Axis("tp", 1, (0, 1, 2, 3))
"""What needs no group: rank 1 of 4."""


@pytest.mark.parametrize("tp", [2, 4])
def test_models_stay_what_they_are(pool: Pool, tp: int) -> None:
    """Of each family; on four ranks two key/value heads are held in copies, and 20 inner features are padded."""
    pool.run(tp, _families, timeout=120)


def _families(world: World) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        for n, family in enumerate(FAMILIES[world.size]):
            compare(family, state, sequence_parallel=n % 2 == 0)


def compare(family: str, state: ParallelState, *, sequence_parallel: bool) -> None:
    plain, tp = build(family), state.axis("tp")
    model = deepcopy(plain)
    if tp.rank:  # the first rank's values count
        for param in model.parameters():
            nn.init.zeros_(param)
    parallelize(model, plan_of(model, tp, sequence_parallel=sequence_parallel), tp)
    names = {name for name, _ in plain.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names
    if not sequence_parallel and not plain.config.tie_word_embeddings:
        _cut_logits(family, plain, state)
    with shard(model, state, sharding="none") as sharded:
        optimizer = sharded.optimizer(AdamW(eps=1e-3))
        wanted, found = _trained(plain, None), _trained(model, sharded)
        with sharded.whole():
            full = gather_full(
                slices(sharded.declared, lambda p: sharded.part(p, lambda b: b.grad), sharded.position()), tp
            )
            _equal(f"{family}, gradients", full, {n: p.grad for n, p in plain.named_parameters()})
        _equal(family, {"logits": found}, {"logits": wanted})
        optimizer.inner.step(1e-2, torch.ones((), dtype=torch.float64))  # what is summed is not summed again
        _plain_update(plain)
        with sharded.whole():
            held = slices(sharded.declared, lambda p: p.data, sharded.position())
            _equal(f"{family}, updated", gather_full(held, tp), {n: p.detach() for n, p in plain.named_parameters()})


def _trained(model: Any, sharded: Any) -> Tensor:
    tokens, labels, mask = rows()
    with in_fp64():
        logits = model(tokens, use_cache=False).logits
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        ((losses * mask).sum() / mask.sum()).backward()
    if sharded is not None:
        sharded.finish()
    found: Tensor = logits.detach()
    return found


def _plain_update(model: Any) -> None:
    """AdamW as torch has it, in which vectors do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() > 1) is d], "weight_decay": 0.1 * d}
        for d in (False, True)
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3).step()


def _cut_logits(family: str, plain: Any, state: ParallelState) -> None:
    """Left cut, logits go into a loss that never joins them."""
    model, tp = deepcopy(plain), state.axis("tp")
    parallelize(model, plan_of(model, tp, gather_logits=False), tp)
    tokens, labels, mask = rows()
    with in_fp64():
        logits = model(tokens, use_cache=False).logits
        vocab = plain.config.vocab_size
        chunk = logits.shape[-1]
        start = min(tp.rank * chunk, vocab)
        losses = vocab_parallel_cross_entropy(logits, labels, tp, start=start, rows=min(chunk, vocab - start))
        want = F.cross_entropy(plain(tokens, use_cache=False).logits.transpose(1, 2), labels, reduction="none")
    _equal(family, {"losses": losses.detach() * mask}, {"losses": want.detach() * mask})


def _equal(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys(), f"{what}: {found.keys() ^ wanted.keys()}"
    for name, want in wanted.items():
        error = (found[name] - want).abs().max().item() / max(1e-3, want.abs().max().item())
        assert error < 1e-10, f"{what}, {name}: {error:.1e}"


class Small(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 12), nn.Linear(12, 6), nn.LayerNorm(6)
        self.drop = nn.Dropout(dropout)


@pytest.mark.parametrize(
    ("plan", "dropout", "said"),
    [
        ({"up": "colwise", "down": "rowwise"}, 0.0, "no pattern of the plan says how norm.weight, norm.bias lie"),
        ({"*": "replicated", "gate": "colwise"}, 0.0, "no module has a name like gate"),
        ({"up": "columns"}, 0.0, "up: no style 'columns'; take one of colwise, rowwise"),
        ({"up": Colwise(3), "*": "replicated"}, 0.0, "up: 3 heads over tp=4 ranks: the ranks must divide the heads"),
        ({"up": Colwise(3, copied=True), "*": "replicated"}, 0.0, "or be a multiple of them"),
        ({"norm": "colwise", "*": "replicated"}, 0.0, "norm is a LayerNorm, which is not cut: colwise takes a torch"),
        ({"*": "replicated"}, 0.1, "drop.p = 0.1: torch draws the masks"),
    ],
)
def test_what_cannot_be_cut_is_rejected_with_the_numbers(plan: Plan, dropout: float, said: str) -> None:
    module = Small(dropout)
    before = {name: id(p) for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        parallelize(module, plan, TP)
    assert {name: id(p) for name, p in module.named_parameters()} == before


def test_a_tied_parameter_lies_in_one_way() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    module["head"].weight = module["embed"].weight
    with pytest.raises(ValueError, match=r"head.weight is the parameter of embed, too: both must be cut the same way"):
        parallelize(module, {"embed": "vocab", "head": "replicated"}, TP)


def test_a_model_without_a_plan_says_which_have_one() -> None:
    with pytest.raises(ValueError, match=r"no plan for Small of model_type None; .* llama, mistral, qwen2"):
        plan_of(Small(), TP)
    llama = build("llama")
    with pytest.raises(ValueError, match="4 attention heads over tp=3 ranks"):
        plan_of(llama, Axis("tp", 0, (0, 1, 2)))


def test_a_sequence_that_does_not_divide_is_rejected() -> None:
    module = nn.Sequential(nn.LayerNorm(4))
    parallelize(module, {"": Around("part"), "0": Replicated(partial=True)}, Axis.single("tp"))
    parallelize(other := nn.Sequential(nn.Linear(4, 4)), {"": Around(), "0": Rowwise()}, Axis.single("tp"))
    module.__dict__["_cut_over"] = type(module.__dict__["_cut_over"])(Around("part"), TP, 0)
    with pytest.raises(ValueError, match="a sequence of 7 tokens over tp=4 ranks"):
        module(torch.zeros(1, 7, 4))
    assert other(torch.zeros(1, 7, 4)).shape == (1, 7, 4)
