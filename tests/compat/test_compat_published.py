"""The flags of published launch scripts: what goes over, and exactly what is rejected.

Flags and values are those of examples/gpt3/train_gpt3_175b_distributed.sh, examples/llama/train_llama3_8b_h100_fp8.sh
and examples/mixtral/train_mixtral_8x7b_distributed.sh of NVIDIA/Megatron-LM. Llama-3 70B has no script there: these are
the flags of 8B with the sizes of Grattafiori et al., "The Llama 3 Herd of Models" (2024), table 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from stretto.arguments import parse
from stretto.cli.megatron import layer
from stretto.compat.megatron import translate, words_of
from stretto.estimate import count_parameters

pytestmark = pytest.mark.pure

COMMON = "--nproc_per_node 8 --nnodes 1 --save out --load out --tensorboard-dir logs --use-mcore-models"

GPT3_175B = f"""
{COMMON} --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
--attention-backend auto --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375
--train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0
--fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path text --vocab-file vocab --merge-file merges
--split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10
"""

LLAMA3 = f"""
{COMMON} --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
--position-embedding-type rope --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu
--init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p --untie-embeddings-and-output-weights
--disable-bias-linear --micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000
--lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --lr-decay-style cosine
--clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --cross-entropy-loss-fusion
--calculate-per-token-loss --manual-gc --empty-unused-memory-level 1 --context-parallel-size 1 --sequence-parallel
--overlap-grad-reduce --mock-data --tokenizer-type NullTokenizer --vocab-size 128256 --data-cache-path cache
--tiktoken-pattern v2 --split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1
--log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --ckpt-format torch_dist
--distributed-timeout-minutes 60
"""

LLAMA3_8B_FP8 = f"""
{LLAMA3} --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --rotary-base 1000000
--tensor-model-parallel-size 1 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --grad-reduce-in-bf16
--exit-duration-in-mins 235 --fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max
--fp8-param-gather --use-distributed-optimizer --overlap-param-gather --profile --profile-step-start 4
--profile-step-end 6
"""

LLAMA3_70B = f"""
{LLAMA3} --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 --rotary-base 500000
--normalization RMSNorm --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4
"""

MIXTRAL_8X7B = f"""
{COMMON} --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32 --hidden-size 4096
--ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0 --hidden-dropout 0.0
--normalization RMSNorm --position-embedding-type rope --swiglu --untie-embeddings-and-output-weights
--group-query-attention --num-query-groups 8 --no-masked-softmax-fusion --no-position-embedding --rotary-base 1000000
--num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--moe-grouped-gemm --moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce
--tokenizer-type Llama2Tokenizer --tokenizer-model model --data-path text --split 99990,8,2 --micro-batch-size 1
--global-batch-size 256 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5
--weight-decay 0.1 --lr-warmup-iters 500 --clip-grad 1.0 --bf16 --tensor-model-parallel-size 1
--pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --use-distributed-optimizer --sequence-parallel
--log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --no-load-optim --no-load-rng
--wandb-project Mixtral --wandb-exp-name Mixtral_8x7B
"""

PROFILE = {"--profile", "--profile-step-start", "--profile-step-end"}
FP8 = {"--fp8-format", "--fp8-param-gather"}  # the recipe that is not said is the delayed one


@dataclass(frozen=True)
class Published:
    flags: str
    parameters: int
    """Of the model that goes over."""
    rejected: set[str] = field(default_factory=set)
    more: str = ""
    """What the user says for it to be a run here."""


SCRIPTS = {
    "GPT-3 175B": Published(
        GPT3_175B,
        96 * (12 * 12288**2 + 13 * 12288) + (50257 + 2048) * 12288 + 2 * 12288,
        {"--rampup-batch-size", "--fp16", "--attention-dropout"},
        "--vocab 50257 --nproc 128",
    ),
    "Llama-3 8B": Published(
        LLAMA3_8B_FP8,
        8_030_261_248,
        {*FP8, *PROFILE, "--decoupled-lr", "--decoupled-min-lr", "--grad-reduce-in-bf16"},
        "--nproc 8 --norm rms",
    ),
    "Llama-3 70B": Published(LLAMA3_70B, 70_553_706_496, set(), "--nproc 64"),
    "Mixtral 8x7B": Published(
        MIXTRAL_8X7B,
        46_702_792_704,
        {"--no-load-optim", "--no-load-rng"},
        "--vocab 32000 --nproc 32",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_exactly_what_is_missing_is_rejected(name: str) -> None:
    script = SCRIPTS[name]
    rejected = translate(words_of(script.flags)).rejected
    assert {v.problem.partition(":")[0] for v in rejected} == script.rejected


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_left_is_the_published_model(name: str) -> None:
    script = SCRIPTS[name]
    words = [w for flag in words_of(script.flags) if flag[0] not in script.rejected for w in flag]
    words += "" if "--attention-dropout" in words else ["--attention-dropout", "0", "--hidden-dropout", "0"]
    run = parse([*script.more.split(), "--megatron", *words], env={}, translate=layer, files=False)
    assert count_parameters(run.args.model, run.args.batch.seq_len).total == script.parameters
