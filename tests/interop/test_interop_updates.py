"""Updates against torch's AdamW on the code of transformers, in fp64: the loss after each, and all weights.

In fp32 losses after an update are no sharp test: AdamW's first is lr * g / (|g| + eps), with the sign of a gradient
that is all rounding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import interop_oracle as oracle
import pytest
import torch

from stretto.arguments.schema import Arguments, BatchConfig, OptimizerConfig, RunConfig
from stretto.batch import Batch
from stretto.interop.config import read_config
from stretto.interop.export import plan, tensors
from stretto.interop.live import Live
from stretto.interop.shapes import logical_shapes
from stretto.layout import Layout
from stretto.train.huggingface import init_from
from stretto.verify.session import build
from stretto.world import World

STEPS, LR, DECAY = 3, 3e-2, 0.1


@pytest.mark.gloo
@pytest.mark.parametrize("name", ["gemma3", "llama3"])
def test_updates_are_those_of_torch(name: str, tmp_path: Path) -> None:
    """Catches norms that decay, in whatever form they hold their weight, a tied matrix that does not, and a gradient's
    norm that counts it twice."""
    model = oracle.build(name)
    with oracle.in_fp64():
        oracle.save(model, tmp_path, torch.float64)
    losses, weights = theirs(model)
    config = read_config(tmp_path)
    args = Arguments(
        model=config.model,
        batch=BatchConfig(seq_len=oracle.SEQ, micro_batch=1, global_batch=oracle.ROWS),
        optimizer=OptimizerConfig(lr=LR, min_lr=0.0, clip_grad=1.0, weight_decay=DECAY),
        run=RunConfig(dtype="fp64"),
    )
    args = replace(args, checkpoint=replace(args.checkpoint, init_from=str(tmp_path)))
    tokens, labels, mask = oracle.rows()
    batch = Batch(tokens, labels, mask, torch.arange(oracle.ROWS))
    named = plan(config, logical_shapes(config.model, oracle.SEQ), torch.float64, tmp_path)
    with build(args, Layout.of(), World.single(), draw=False) as session:
        init_from(args, session.built)
        for n in range(STEPS):
            loss, _ = session.step(batch)
            assert abs(loss - losses[n]) < 1e-10 * losses[n], n
        for key, found in tensors(named, Live(session.built.optimizer.slices(), session.world)):
            assert (found - weights[key]).abs().max() < 1e-10, key
        assert losses[-1] < losses[0]


def theirs(model: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses before each update, and the weights after the last, of AdamW that decays matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for _ in range(STEPS):
        _, loss, _ = oracle.run(model)
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    return losses, oracle.weights_of(model)


@pytest.mark.gloo
def test_what_transformers_does_not_train_of_its_padding_token() -> None:
    """Its embedding has a `padding_idx` where config.json names a pad_token_id, as Gemma's does (0): that token has no
    gradient from where it is read. Here it is a token like any other. All else is the same."""
    model = oracle.build("gemma3")
    embedding, padding = model.get_input_embeddings(), int(oracle.rows()[0][1, 0])
    embedding.padding_idx = None
    _, loss, grads = oracle.run(model)
    embedding.padding_idx = padding
    _, same, theirs = oracle.run(model)
    assert loss == same
    differ = {
        n: (theirs[n] - g).abs().flatten(1).amax(1).nonzero().flatten().tolist()
        for n, g in grads.items()
        if g.dim() > 1
    }
    assert {n: rows for n, rows in differ.items() if rows} == {"model.embed_tokens.weight": [padding]}
