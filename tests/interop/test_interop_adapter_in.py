"""Adapters that peft has written: a run begins with them, and goes on as peft would.

Faults to catch: adapters that are drawn anew; a scale that is not that of the file; a rank that reads another's part; a
field that is ignored.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import interop_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from stretto.arguments import ConfigError, parse
from stretto.arguments.schema import Arguments, BatchConfig, OptimizerConfig, RunConfig, TuningConfig
from stretto.batch import Batch
from stretto.cli.adopt import adopted
from stretto.interop.adapter_in import CONFIG, WEIGHTS, base_of, begun_with, read_adapter
from stretto.interop.config import read_config
from stretto.interop.errors import InteropError
from stretto.layout import Layout
from stretto.structure import Structure
from stretto.tensor_parallel.lora import Drop, lora_of
from stretto.testing import Pool
from stretto.train.huggingface import init_from, require_init
from stretto.verify.session import build
from stretto.world import World

pytestmark = pytest.mark.gloo

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of peft in fp64, and its directory, beside that of the model below it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("peft")
    model = oracle.build("llama")
    oracle.save(model, root / "base", torch.float64)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False
    )
    with warnings.catch_warnings(), oracle.in_fp64():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, config).double()
        theirs.peft_config["default"].base_model_name_or_path = str(root / "base")
        theirs.save_pretrained(root / "adapter")
    return theirs, root / "adapter"


def settings(adapter: Path) -> Arguments:
    said = read_adapter(adapter).settings()
    args = Arguments(
        model=read_config(begun_with(str(adapter))[0]).model,
        batch=BatchConfig(seq_len=oracle.SEQ, micro_batch=3, global_batch=3),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0),
        run=RunConfig(dtype="fp64", timeout=60.0),
        tuning=TuningConfig(**{**said, "lora_targets": tuple(said["lora_targets"])}),
    )
    return replace(args, checkpoint=replace(args.checkpoint, init_from=str(adapter)))


def test_it_goes_on_as_peft_would(made: tuple[Any, Path]) -> None:
    theirs, adapter = made
    args = settings(adapter)
    o = args.optimizer
    trained = {name: p for name, p in theirs.named_parameters() if "lora" in name}
    rule = torch.optim.AdamW(
        trained.values(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
    )
    tokens, labels, mask = oracle.rows()
    batch = Batch(tokens, labels, mask, torch.arange(3))
    start = {name: p.detach().clone() for name, p in trained.items()}
    with build(args, Layout.of(), World.single()) as session:
        require_init(args)
        init_from(args, session.built)
        for _ in range(3):
            loss, _ = session.step(batch)
            _, expected, _ = oracle.run(theirs)
            assert loss == pytest.approx(expected.item(), rel=1e-12)
            rule.step()
        ours = session.full_params()
    for name, p in trained.items():
        x = ours[name.removeprefix(PREFIX).replace(".default.weight", "")]
        torch.testing.assert_close(x, p.detach(), rtol=0, atol=1e-10)
        with torch.no_grad():
            p.copy_(start[name])


def test_what_falls_away_does_so_where_peft_has_it(made: tuple[Any, Path]) -> None:
    """With our masks in the place of peft's own: the same loss and gradients."""
    theirs, adapter = made
    args = settings(adapter)
    args = replace(args, tuning=replace(args.tuning, lora_dropout=0.5))
    tokens, labels, mask = oracle.rows()
    lora = lora_of(args.tuning)
    assert lora is not None
    plain = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_dropout"):
            drop = Drop(lora, name.removeprefix(PREFIX), args.run.seed)
            plain[module] = module.lora_dropout["default"]
            module.lora_dropout["default"] = _Masked(drop, Structure.of_tokens(oracle.SEQ, torch.arange(3)))
    with build(args, Layout.of(), World.single()) as session:
        init_from(args, session.built)
        loss, _ = session.step(Batch(tokens, labels, mask, torch.arange(3)))
        grads = session.full_grads()
    _, expected, found = oracle.run(theirs)
    for module, before in plain.items():
        module.lora_dropout["default"] = before
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert oracle.run(theirs)[1].item() != pytest.approx(loss, rel=1e-4)
    for name, grad in grads.items():
        theirs_grad = found[f"{PREFIX}{name}.default.weight"]
        torch.testing.assert_close(grad, theirs_grad, rtol=0, atol=1e-10)


class _Masked(torch.nn.Module):
    def __init__(self, drop: Drop, structure: Structure) -> None:
        super().__init__()
        self.drop, self.structure = drop, structure

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, d], as transformers has it."""
        return self.drop(x.transpose(0, 1), self.structure).transpose(0, 1)


def test_every_layout_begins_with_them(pool: Pool, made: tuple[Any, Path]) -> None:
    pool.run(4, _begins, made[1])


def _begins(world: World, adapter: Path) -> None:
    args = settings(adapter)
    parallel = replace(args.parallel, tp=2, dp=2, sharding="fsdp", bucket_mb=0.01)
    args = replace(args, parallel=parallel, batch=replace(args.batch, micro_batch=2, global_batch=4))
    with build(args, Layout.of(tp=2, dp=2), world) as session:
        init_from(args, session.built)
        ours = session.full_params()
    for name, x in load_file(adapter / WEIGHTS).items():
        assert torch.equal(ours[name.removeprefix(PREFIX).removesuffix(".weight")], x), name


def test_its_settings_are_those_of_the_run(made: tuple[Any, Path]) -> None:
    adapter = made[1]
    words = ["--init-from", str(adapter), "--tokenizer", "byte"]
    args = parse(words, env={}, adopt=adopted, files=False).args
    assert (args.tuning.lora_rank, args.tuning.lora_alpha) == (3, 5.0)
    assert args.tuning.lora_targets == ("q", "v", "o", "down")
    assert args.model.layers == 4
    with pytest.raises(ConfigError, match="lora_rank = 4"):
        parse([*words, "--lora-rank", "4"], env={}, adopt=adopted, files=False)
    assert base_of(str(adapter)) == str(adapter.parent / "base")
    assert base_of("no/such") == "no/such"


WRONG = [
    ({"use_dora": True}, "'use_dora' = 'True': not supported"),
    ({"rank_pattern": {"q_proj": 8}}, "'rank_pattern'"),
    ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
    ({"lora_dropout": 1}, "'lora_dropout' = '1': must be in [0, 1)"),
    ({"bias": "all"}, "'bias' = 'all'"),
    ({"peft_type": "IA3"}, "must be 'LORA'"),
    ({"target_modules": "all-linear"}, "must be a list of some of"),
    ({"target_modules": ["qkv_proj"]}, "must be a list of some of"),
    ({"r": 0}, "'r' = '0'"),
    ({"lora_alpha": None}, "'lora_alpha' = 'None'"),
    ({"base_model_name_or_path": None}, "must name the model"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_a_field_that_is_not_supported_is_named(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / CONFIG).write_text(json.dumps({**good, "base_model_name_or_path": "x/y", **change}))
    with pytest.raises(InteropError) as raised:
        read_adapter(tmp_path)
    assert problem in f"{raised.value}"


def test_other_tensors_are_listed(made: tuple[Any, Path], tmp_path: Path) -> None:
    adapter = made[1]
    found = load_file(adapter / WEIGHTS)
    first, second, *_ = found
    found["base_model.model.more"] = torch.zeros(2)
    found[second] = torch.zeros(1, 1)
    del found[first]
    (tmp_path / CONFIG).write_text((adapter / CONFIG).read_text())
    save_file(found, tmp_path / WEIGHTS)
    with pytest.raises(InteropError) as raised:
        require_init(settings(tmp_path))
    for words in (f"{first}: missing", f"{second}: (1, 1) F32, must be", "more: no adapter of this model"):
        assert words in f"{raised.value}"
