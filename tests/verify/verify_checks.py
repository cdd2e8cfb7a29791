"""The few checks that every fault of `verify_faults` must fail; each runs as the ranks of a world, and names what is
wrong, or nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.batch import Batch
from stretto.data.feed import Feed
from stretto.data.lost import Lost
from stretto.data.store import TokenStore, write_store
from stretto.data.text import EvalSet
from stretto.layout import Layout
from stretto.models import StageSpec, Transformer
from stretto.params import Slice, collect, slices
from stretto.tensor_parallel import Build
from stretto.train.record import EvalRecord, Listener
from stretto.train.run import trainer_of
from stretto.verify import Comparison, against_reference, build, gather_full, load_full, random_batch, random_weights
from stretto.world import Axis, World


@dataclass(frozen=True)
class Check:
    """`run` on `ranks` ranks: on each the first thing that is wrong, or nothing."""

    name: str
    ranks: int
    run: Callable[[World], str]


def small(
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    sp: bool = False,
    dtype: str = "fp64",
    rows: int = 0,
    recompute: str = "none",
    **model: object,
) -> Arguments:
    """A small model with awkward sizes, in microbatches of one row; `rows` of them, or 4 for each replica."""
    shape = {"layers": 4, "hidden": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "ffn": 24, "vocab": 53}
    return Arguments(
        model=ModelConfig(**{**shape, **model}),
        parallel=ParallelConfig(tp=tp, pp=pp, dp=dp, sequence_parallel=sp, bucket_mb=0.005),
        batch=BatchConfig(seq_len=8, micro_batch=1, global_batch=rows or 4 * dp),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-4, clip_grad=0.5, weight_decay=0.2),
        run=RunConfig(dtype=dtype, timeout=20.0, recompute=recompute),
    )


def compare(world: World, args: Arguments) -> Comparison:
    """The layout of `args` against one process."""
    p = args.parallel
    return against_reference(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1, order=p.order), world)


def first_wrong(found: Comparison) -> str:
    """The first quantity, in the order in which a run makes them, that differs."""
    wrong = next((f"{d.name} ({d.error:.0e})" for d in found.differences if d.exceeds), "")
    return wrong or (f"replicas of {found.unequal[0]}" if found.unequal else "")


def plain_torch(world: World) -> str:
    """One process against torch's own loss, autograd, clipping and AdamW, the whole batch at once."""
    args = small(bias=True, norm="layer", tied=True, qk_norm=True)
    with build(args, Layout.of(), world) as session:
        start = random_weights(session, 0)
        session.load_full(start)
        model, o = _whole_model(args, start), args.optimizer
        declared = collect(model)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
        adam = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
        for step in (1, 2, 3):
            batch = random_batch(args, step)
            if step == 3:  # no token counts: nothing may move but by the moments and the decay
                batch = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
            loss, norm = session.step(batch)
            own = _mean_loss(model, batch, args.model.vocab_size)
            adam.zero_grad()
            own.backward()
            grads = _whole(slices(declared, lambda p: p.grad, {}), world)
            size = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad).item()
            adam.step()
            params = _whole(slices(declared, lambda p: p.data, {}), world)
            evaluated = _mean_loss(model, batch, args.model.vocab_size)
            for what, ours, theirs in (
                ("loss", {"": _scalar(loss)}, {"": own}),
                ("gradient", session.full_grads(), grads),
                ("gradient norm", {"": _scalar(norm)}, {"": _scalar(size)}),
                ("weight", session.full_params(), params),
                ("evaluation", {"": _scalar(session.evaluate(batch))}, {"": evaluated}),
            ):
                if wrong := _first_apart(ours, theirs):
                    return f"step {step} {what} {wrong}".rstrip()
    return ""


def initial_weights(world: World) -> str:
    """The same bits in every layout of four ranks, in fp32 and bf16, and no tensor like another."""
    for dtype in ("fp32", "bf16"):
        alone = small(dtype=dtype, tied=True, bias=True, position="learned")
        with build(alone, Layout.of(), World.single(world.device)) as session:
            expected = session.full_params()
        drawn = [t.flatten()[:8] for t in expected.values() if t.unique().numel() > 1]
        if any(torch.equal(a, b) for n, a in enumerate(drawn) for b in drawn[:n]):
            return f"two tensors start alike ({dtype})"
        for tp, pp, dp in ((4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2)):
            args = replace(alone, batch=replace(alone.batch, global_batch=4 * dp))
            with build(args, Layout.of(tp=tp, pp=pp, dp=dp), world) as session:
                found, apart = session.full_params(), session.unequal_replicas()
            if set(found) != set(expected):
                return f"names at tp={tp} pp={pp} dp={dp}"
            wrong = [n for n in expected if not torch.equal(found[n], expected[n])] or apart
            if wrong:
                return f"initial {wrong[0]} at tp={tp} pp={pp} dp={dp} ({dtype})"
    return ""


def held_out_loss(world: World) -> str:
    """The loop's evaluation of text that does not fill its last batch, against the mean over all of its tokens."""
    args = small(pp=2, dp=2)
    vocab, seq = args.model.vocab_size, args.batch.seq_len
    with tempfile.TemporaryDirectory() as directory:
        text = _store(Path(directory, "text.tokens"), 11 * seq + 4, vocab)  # 11.4 rows: of 16, 9 on one dp rank
        with build(args, Layout.of(pp=2, dp=2), world) as session:
            weights = random_weights(session, 0)
            session.load_full(weights)
            told = _Heard()
            held_out = [EvalSet("held_out", text, Lost(), None)]
            trainer_of(args, session.built, Feed(text, seq_len=seq, seed=0), held_out).loop(1, told).evaluate()
        tokens = torch.from_numpy(text.tokens.astype("int64"))
    model = _whole_model(args, weights)
    total = 0.0
    for start in range(0, len(tokens) - 1, seq):
        piece = tokens[start : start + seq + 1]
        total += F.cross_entropy(model.logits(piece[None, :-1])[:, 0, :vocab], piece[1:], reduction="sum").item()
    expected = total / (len(tokens) - 1)
    return "" if abs(told.losses[0] / expected - 1) < 1e-10 else f"evaluation {told.losses[0]:.6f}, not {expected:.6f}"


def _against(**options: object) -> Callable[[World], str]:
    def run(world: World) -> str:
        return first_wrong(compare(world, small(**options)))

    return run


CHECKS = (
    Check("plain torch", 1, plain_torch),
    Check(
        "tp=4, sequence parallel, 2 kv heads, learned positions",
        4,
        _against(tp=4, sp=True, norm="layer", bias=True, position="learned", qk_norm=True),
    ),
    Check(
        "tp=2, pp=2, tied, 1 kv head, dropout",
        4,
        _against(tp=2, pp=2, kv_heads=1, tied=True, qk_norm=True, bias=True, dropout=0.2),
    ),
    Check("pp=2, dp=2, tied", 4, _against(pp=2, dp=2, tied=True)),
    Check("tp=2, dp=2, sequence parallel, dropout", 4, _against(tp=2, dp=2, sp=True, dropout=0.2)),
    Check("tp=2, selective recomputation", 2, _against(tp=2, recompute="selective", norm="layer", bias=True)),
    Check("tp=2, sequence parallel, selective recomputation", 2, _against(tp=2, sp=True, recompute="selective")),
    Check("dp=2 in bf16", 2, _against(dp=2, dtype="bf16")),
    Check("initial weights", 4, initial_weights),
    Check("held-out text", 4, held_out_loss),
)


def _whole_model(args: Arguments, weights: Mapping[str, Tensor]) -> Transformer:
    """The model as a plain module in fp64, with `weights`; padding is zero."""
    alone = Build(Axis("tp", 0, (0,)), False, torch.float64)
    model = Transformer(args.model, StageSpec.whole(args.model), alone, seq_len=args.batch.seq_len)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    load_full(slices(collect(model), lambda p: p.data, {}), weights)
    return model


def _store(path: Path, tokens: int, vocab: int) -> TokenStore:
    ids = torch.randint(vocab, (tokens - 2,), generator=torch.Generator().manual_seed(3))
    with write_store(path, vocab_size=vocab, eod=0, fingerprint="") as store:
        store.add(ids.numpy(), tokens)
    return TokenStore.open(path)


class _Heard(Listener):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def evaluated(self, record: EvalRecord) -> None:
        self.losses.append(record.loss)


def _mean_loss(model: Transformer, batch: Batch, vocab: int) -> Tensor:
    logits = model.logits(batch.tokens)[..., :vocab].transpose(0, 1)  # [b, s, V]
    total = F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask], reduction="sum")
    return total / max(1, int(batch.loss_mask.sum()))


def _whole(pieces: list[Slice], world: World) -> dict[str, Tensor]:
    return gather_full(pieces, Axis("world", 0, (world.rank,)))


def _first_apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    """The first tensor that differs by more than rounding in fp64, relative to the largest of all."""
    size = max(t.abs().max().item() for t in theirs.values()) or 1.0
    apart = {n: (ours[n].double() - theirs[n].double()).abs().max().item() / size for n in theirs}
    return next((f"{n} ({e:.0e})" for n, e in apart.items() if not e < 1e-10), None)


def _scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)
