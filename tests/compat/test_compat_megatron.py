"""Launch scripts for Megatron-LM become settings files, or are rejected with the flags that cannot be had."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stretto.arguments import parse
from stretto.arguments.tree import settings
from stretto.cli.convert import main
from stretto.compat.megatron import Translation, translate, words_of
from stretto.compat.megatron.flags import BY_HAND, DEFAULTS, MISSING, ONLY, SAME, SWITCHES
from stretto.compat.megatron.moot import MOOT
from stretto.compat.megatron.reference import PAGE, page

pytestmark = pytest.mark.pure

SCRIPT = Path(__file__).parent / "llama.sh"
SMALL = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2 "
    "--attention-dropout 0 --hidden-dropout 0"
)


def translated(flags: str) -> Translation:
    return translate(words_of(flags), processes=8)


def values(flags: str) -> dict[str, object]:
    return {path: value for path, (value, _) in translated(flags).values.items()}


def rejected(flags: str) -> list[str]:
    return [v.problem.partition(":")[0] for v in translated(flags).rejected]


def test_a_script_becomes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    assert main(["args", str(SCRIPT), "--out", str(file)]) == 0
    run = parse(["--config", str(file), "--nproc", "64"], env={})
    m, p, o = run.args.model, run.args.parallel, run.args.optimizer
    assert (m.layers, m.hidden, m.heads, m.kv_heads, m.ffn, m.vocab) == (32, 4096, 32, 8, 14336, 128256)
    assert (m.norm, m.position, m.rope_base, m.activation) == ("rms", "rope", 500_000.0, "swiglu")
    assert (m.bias, m.tied) == (False, False)
    assert (p.tp, p.pp, p.dp, p.sequence_parallel) == (8, 4, 2, True)
    assert (run.args.run.steps, o.decay_steps, o.warmup_steps) == (1953125 // 128, 1949218 // 128, 3906 // 128)
    assert (run.args.data.held_out, run.args.checkpoint.out) == (0.01, "checkpoints/llama3_8b")
    said = capsys.readouterr().err
    assert "changes nothing here: --use-mcore-models: chooses among implementations" in said
    assert "to be said by hand: --tokenizer-model: name a tokenizer.json with --tokenizer" in said


def test_what_a_script_leaves_unsaid_is_megatrons_default() -> None:
    said = values(SMALL)
    assert (said["model.norm"], said["model.position"], said["model.activation"]) == ("layer", "learned", "gelu-tanh")
    assert (said["model.bias"], said["model.tied"], said["optimizer.beta2"]) == (True, True, 0.999)
    assert (said["optimizer.lr_schedule"], said["optimizer.min_lr"]) == ("linear", 0.0)
    assert values(SMALL.replace("--hidden-dropout 0", ""))["model.dropout"] == 0.1


def test_the_forms_of_gelu_are_told_apart() -> None:
    """Catches --openai-gelu trained with the exact form."""
    assert values(SMALL + " --openai-gelu")["model.activation"] == "gelu-tanh"
    assert values(SMALL + " --swiglu")["model.activation"] == "swiglu"


def test_the_published_gpt3_175b_needs_dropout_of_attention_fp16_and_a_ramp() -> None:
    """The flags of examples/gpt3/train_gpt3_175b_distributed.sh of NVIDIA/Megatron-LM."""
    flags = """
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
    --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375 --train-iters 500000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16
    --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16
    --split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10
    """
    assert rejected(flags) == ["--rampup-batch-size", "--fp16", "--attention-dropout"]
    said = values(flags)
    assert (said["optimizer.warmup_steps"], said["optimizer.decay_steps"], said["data.held_out"]) == (
        430,
        430000,
        0.051,
    )


def test_flags_of_experts_go_over() -> None:
    """As in scripts for Mixtral and for DeepSeek-V3. Megatron-LM cuts experts over tp unless it is told otherwise."""
    mixtral = values(f"{SMALL} --num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm")
    assert (mixtral["model.experts"], mixtral["model.top_k"], mixtral["model.balance_loss"]) == (8, 2, 0.01)
    assert mixtral["model.router"] == "softmax-top-k"
    deepseek = values(
        f"{SMALL} --num-experts 64 --moe-router-topk 6 --moe-router-score-function sigmoid --moe-router-num-groups 8 "
        "--moe-router-group-topk 4 --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3 "
        "--moe-router-load-balancing-type none --moe-router-topk-scaling-factor 2.5 --moe-ffn-hidden-size 64 "
        "--moe-shared-expert-intermediate-size 128 --moe-layer-freq '([0]*1+[1]*1)' --tensor-model-parallel-size 2"
    )
    wanted = {"router": "sigmoid", "router_bias": True, "router_groups": 8, "router_top_groups": 4, "router_scale": 2.5}
    wanted |= {"router_group_score": "top2", "first_dense": 1, "shared_ffn": 128, "expert_ffn": 64}
    assert {name: deepseek[f"model.{name}"] for name in wanted} == wanted
    assert deepseek["parallel.etp"] == 2
    assert "model.balance_loss" not in deepseek


def test_what_has_no_like_among_the_flags_of_experts_is_rejected() -> None:
    assert rejected(f"{SMALL} --num-experts 8 --moe-router-load-balancing-type sinkhorn") == [
        "--moe-router-load-balancing-type"
    ]
    for freq in ("x", "'[0]*2+[2]'", "'[1]*9**9'", "'[0]+1'", "'print(1)'"):
        assert rejected(f"{SMALL} --num-experts 8 --moe-layer-freq {freq}") == ["--moe-layer-freq"]


@pytest.mark.parametrize(
    ("freq", "dense"),
    [("2", (1, 3)), ("'[1, 0]*2'", (1, 3)), ("'([0]+[1]*2)+[0]'", (0, 3)), ("3", (1, 2))],
)
def test_any_layers_may_have_experts(freq: str, dense: tuple[int, ...]) -> None:
    """Catches: each n-th layer counted from another than the first."""
    flags = f"{SMALL.replace('--num-layers 2', '--num-layers 4')} --num-experts 8 --moe-layer-freq"
    assert values(f"{flags} {freq}")["model.dense_layers"] == dense
    assert rejected(f"{flags} '[1]*3'") == ["--moe-layer-freq"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sequence-parallel --tensor-model-parallel-size 2", {"parallel.sequence_parallel": True}),
        ("--group-query-attention --num-query-groups 2", {"model.kv_heads": 2}),
        ("--swiglu", {"model.ffn": 640}),  # 8 * 256 / 3 = 682, down to a multiple of 64
        ("--position-embedding-type rope --rotary-base 500000", {"model.rope_base": 500000.0}),
        ("--use-rotary-position-embeddings", {"model.position": "rope"}),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 7 --lr-wsd-decay-style linear", {"optimizer.cooldown_steps": 7}),
        ("--distributed-timeout-minutes 2", {"run.timeout": 120.0}),
        ("--seed=7", {"run.seed": 7}),
        ("--mtp-num-layers 1", {"model.mtp_layers": 1, "model.mtp_loss": 0.1}),
        ("--mtp-num-layers 2 --mtp-loss-scaling-factor 0.3", {"model.mtp_layers": 2, "model.mtp_loss": 0.3}),
        ("--use-distributed-optimizer --overlap-param-gather", {"parallel.sharding": "zero1"}),
        ("--use-torch-fsdp2", {"parallel.sharding": "fsdp"}),
        ("--save-interval 10", {"checkpoint.keep_every": 1}),  # no checkpoint of a run is removed
        ("--save-interval 10 --save-retain-interval 100", {"checkpoint.keep_every": 100}),
        (
            "--position-embedding-type rope --use-rope-scaling --rope-scaling-factor 32",
            {"model.rope_scaling": "llama3", "model.rope_factor": 32.0, "model.rope_original_positions": 8192},
        ),
        (
            "--position-embedding-type rope --rotary-seq-len-interpolation-factor 2",
            {"model.rope_scaling": "linear", "model.rope_factor": 2.0},
        ),
        (
            "--num-layers 9 --pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 2 "
            "--decoder-last-pipeline-num-layers 1",
            {"parallel.stage_layers": (2, 3, 3, 1)},
        ),
        (
            "--num-layers 5 --pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 1",
            {"parallel.stage_layers": (4, 1)},
        ),
        (
            "--num-layers 8 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2",
            {"parallel.vpp": 2, "parallel.schedule": "interleaved", "parallel.stage_layers": (2, 2, 2, 2)},
        ),
        ("--rerun-mode disabled --lr-warmup-init 0.0 --weight-decay-incr-style constant", {}),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", {"parallel.sharding": "zero2"}),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params", {"parallel.sharding": "fsdp"}),
        ("--use-megatron-fsdp --use-distributed-optimizer", {"parallel.sharding": "none"}),  # Megatron-LM's default
        ("--optimizer sgd --sgd-momentum 0.8", {"optimizer.optimizer": "sgd", "optimizer.momentum": 0.8}),
        ("--exit-duration-in-mins 235", {"run.exit_duration": 14100.0}),
        ("--hidden-dropout 0.2", {"model.dropout": 0.2}),
        ("--recompute-granularity full --recompute-method uniform", {"run.recompute": "block"}),
        (
            "--bf16 --fp8-format hybrid --fp8-recipe tensorwise --fp8-amax-history-len 1024",
            {"run.fp8": "tensorwise", "run.dtype": "bf16"},
        ),
        ("--recompute-granularity selective", {"run.recompute": "selective"}),
        ("--recompute-activations --recompute-modules core_attn", {"run.recompute": "selective"}),
        ("--split 949/50/1", {"data.held_out": 0.051}),
        ("--split '99,1,0'", {"data.held_out": 0.01}),
        ("--split 100,0,0 --eval-iters 0", {"data.held_out": 0.0, "run.eval_every": 0}),
        ("--tensor-model-parallel-size 2 --context-parallel-size 2", {"batch.global_batch": 4}),  # 2 * 8 / (2*2)
        ("--deterministic-mode", {"run.deterministic": True}),
        ("--use-tp-pp-dp-mapping", {"parallel.order": "tp-cp-ep-pp-dp"}),
        ("--high-priority-stream-groups tp dp_cp", {"nccl.high_priority": ("tp", "dp-cp")}),
        ("--context-parallel-size 2", {"parallel.cp_comm": ("ring",)}),  # Megatron-LM's default
        ("--context-parallel-size 2 --cp-comm-type a2a", {"parallel.cp_comm": ("ulysses",)}),
        (
            "--context-parallel-size 4 --cp-comm-type p2p a2a+p2p --hierarchical-context-parallel-sizes 2 2",
            {"parallel.cp_comm": ("ring", "hybrid"), "parallel.cp_a2a": 2},
        ),
    ],
)
def test_flags_that_take_more_than_copying(flags: str, said: dict[str, object]) -> None:
    assert said.items() <= values(f"{SMALL} {flags}").items()
    assert not rejected(f"{SMALL} {flags}")


@pytest.mark.parametrize(
    ("flags", "form"),
    [
        ("", "gelu-tanh"),  # fused with a bias
        ("--no-bias-gelu-fusion", "gelu"),
        ("--disable-bias-linear", "gelu"),  # nothing to fuse with
        ("--openai-gelu", "gelu-tanh"),
        ("--openai-gelu --no-bias-gelu-fusion", "gelu-tanh"),
        ("--swiglu --no-bias-gelu-fusion", "swiglu"),
    ],
)
def test_gelu_is_the_form_that_megatron_computes(flags: str, form: str) -> None:
    """Fault to catch: the exact form for the default, which fuses the bias in the tanh form."""
    assert values(f"{SMALL} {flags}")["model.activation"] == form


def test_what_adam_alone_has_is_dropped_beside_sgd() -> None:
    """As there; a script of SGD was rejected for Megatron-LM's own default of beta2."""
    assert not {"optimizer.beta2", "optimizer.eps"} & set(values(f"{SMALL} --optimizer sgd --adam-eps 1e-5"))


def test_sequence_parallelism_without_tensor_parallelism_is_dropped_as_there() -> None:
    assert "parallel.sequence_parallel" not in values(f"{SMALL} --sequence-parallel")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--num-layer 3", "--num-layer: is not known; did you mean --num-layers?"),
        ("--rerun-mode validate_results", "--rerun-mode: 'validate_results' is not available: steps are not run again"),
        ("--lr-warmup-init 1e-6", "--lr-warmup-init: '1e-6' is not available: a warm-up begins at 0"),
        ("--fp8-format e4m3 --fp8-recipe blockwise", "--fp8-recipe: 'blockwise' is not available: say --fp8-recipe"),
        ("--kv-lora-rank 512", "--kv-lora-rank: latent attention is not translated: say --kv-lora-rank"),
        ("--reset-attention-mask", "--reset-attention-mask: say --packing"),
        (
            "--num-layers 9 --pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 2",
            "--decoder-first-pipeline-num-layers: 7 other layers are not shared equally by 3 other stages",
        ),
        ("--deepspeed_config ds.json", "--deepspeed_config: DeepSpeed's file is not read: say --sharding zero1"),
        ("--num-layers many", "--num-layers: 'many' is text, must be a whole number"),
        ("--high-priority-stream-groups tp ep", "ep: not available; there is tp, cp, pp, dp, dp_cp"),
        (
            "--context-parallel-size 2 --cp-comm-type ring",
            "--cp-comm-type: ring: not available; there is p2p, all_gather",
        ),
        (
            "--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 4",
            "--hierarchical-context-parallel-sizes: 2 4: a2a+p2p needs two sizes whose product is",
        ),
        ("--fp8-format hybrid", "--fp8-format: delayed scaling, Megatron-LM's default, is not"),
        ("--fp8-format hybrid --fp8-recipe delayed", "--fp8-format: delayed scaling, Megatron-LM's default, is not"),
        ("--fp8-format hybrid --fp8-recipe mxfp8", "--fp8-recipe: 'mxfp8' is not available: say --fp8-recipe"),
        ("--fp8-format e4m3 --fp8-recipe tensorwise", "--fp8-format: 'e4m3' is not available; there is hybrid"),
        ("--lr $LR", "--lr: the value of $LR is not known here"),
        ("--lr 1 2", "--lr: takes one value, got 2"),
        ("--optimizer muon", "--optimizer: 'muon' is not available; there is adam, sgd"),
        ("--attention-dropout 0.1", "attention weights are not dropped: say --attention-dropout 0"),
        ("--recompute-granularity some", "'some' is not available; there is full, selective"),
        ("--split 0,0,0", "--split: '0,0,0' leaves nothing to train on"),
        ("--split valid", "--split: 'valid' is not one to three numbers"),
        ("--bf16 yes", "--bf16: takes no value, got yes"),
        ("--train-iters nan", "--train-iters: nan is no finite number"),
        ("--train-samples 10", "--train-samples: needs --global-batch-size"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 7", "'exponential' is not available; there is linear"),
        ("--normalization DyT", "--normalization: 'DyT' is not available; there is RMSNorm, LayerNorm"),
    ],
)
def test_what_cannot_be_had_is_rejected(flags: str, problem: str) -> None:
    (found,) = translated(f"{SMALL} {flags}").rejected
    assert problem in str(found)


def test_megatrons_learning_rate_is_said_to_be_a_step_behind() -> None:
    assert "update u takes the rate of step u-1" in " ".join(translated(SMALL).notes)


def test_what_megatron_demands_is_demanded() -> None:
    """Fault to catch: a default of ours in the place of what the script has forgotten."""
    assert rejected("--num-layers 2 --attention-dropout 0") == [
        "--hidden-size",
        "--num-attention-heads",
        "--seq-length",
        "--micro-batch-size",
    ]
    assert "needs dp: say --global-batch-size 2 times dp" in str(translate(words_of(SMALL)).rejected[0])
    assert "3 processes / (tp*pp*cp = 2*1*1) is not whole" in str(
        translate(words_of(f"{SMALL} --tensor-model-parallel-size 2"), processes=3).rejected[0]
    )


def test_every_flag_has_one_meaning() -> None:
    tables = (SAME, SWITCHES, MOOT, BY_HAND, MISSING, ONLY)
    flags = [flag for table in tables for flag in table]
    assert len(flags) == len(set(flags))
    paths = [*SAME.values(), *DEFAULTS, *(path for path, _ in SWITCHES.values())]
    assert set(paths) <= set(settings())


def test_rejected_flags_and_broken_rules_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = tmp_path / "run.sh", tmp_path / "run.toml"
    script.write_text(f"{SMALL} --tensor-model-parallel-size 3 --fp16")
    assert main(["args", str(script), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "--fp16" in said
    assert "heads % tp = 4 % 3 = 1, must be 0" in said
    assert not out.exists()
    assert main(["args", str(script), "--out", str(out), "--partial"]) == 2
    assert tomllib.loads(out.read_text())["parallel"]["tp"] == 3
    assert main(["args", str(tmp_path / "none.sh")]) == 2


@pytest.mark.parametrize(
    ("flags", "vpp", "layers"),
    [
        ("--num-virtual-stages-per-pipeline-rank 2", 2, None),
        ("--num-virtual-stages-per-pipeline-rank 1", None, None),
        ("--num-layers-per-virtual-pipeline-stage 2", 4, (2,) * 8),
        ("--pipeline-model-parallel-layout 'Et*4|(t*4|)*2t*4L'", 2, (4, 4, 4, 4)),
        ("--pipeline-model-parallel-layout 'Et*8|t*8L'", None, (8, 8)),
    ],
)
def test_stages_of_a_rank(flags: str, vpp: int | None, layers: tuple[int, ...] | None) -> None:
    """Catches a rest that is dropped, and stages counted for layers."""
    words = f"{SMALL} --num-layers 16 --pipeline-model-parallel-size 2 {flags}"
    said = values(words)
    assert said.get("parallel.vpp") == vpp
    assert said.get("parallel.schedule") == ("interleaved" if vpp else None)
    assert said.get("parallel.stage_layers") == layers
    odd = f"{SMALL} --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'Et*3|(tt|)*6t|L'"
    assert "9 stages are no multiple of 2 ranks" in str(translated(odd).rejected)


def test_the_reference_page_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "reference" / PAGE).read_text(encoding="utf-8")
    assert written == page(), "run: python -m stretto.compat.megatron.reference docs/reference"


def test_translating_needs_no_torch() -> None:
    code = "import sys, stretto.cli.convert, stretto.compat.megatron.reference; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
