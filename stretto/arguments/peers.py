"""What other programs call a setting or a choice: it leads to ours, or to the word that there is none yet.

The rows are read where an unknown option or choice is reported. A row whose setting the schema lacks says that the
feature is not available yet, and leads there once the schema has it.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """`names` is a regular expression over the flag, without dashes before it; `ours` is None where there is none."""

    names: str
    ours: str | None
    feature: str = ""


@dataclass(frozen=True)
class PeerChoice:
    """The same for a choice of one of our settings; `ours` then is the nearest one, if any comes near."""

    setting: str
    names: str
    ours: str | None
    feature: str = ""


_SIZE = "(-size|-degree)?"

FLAGS: tuple[Peer, ...] = (
    Peer(f"tensor-(model-)?parallel(ism)?{_SIZE}|tp-(size|degree)|model-parallel-size", "--tp"),
    Peer(f"pipeline-(model-)?parallel(ism)?{_SIZE}|pp-(size|degree)", "--pp"),
    Peer(f"data-parallel(ism)?{_SIZE}|data-parallel-replicate-degree|dp-(size|degree)|ddp", "--dp"),
    Peer("cp-comm.*", "--cp-comm"),
    Peer("hierarchical-context-parallel.*|ulysses-(degree|size)", "--cp-a2a"),
    Peer(f"context-parallel(ism)?{_SIZE}|cp-(size|degree)|ulysses.*|ring-attention", "--cp"),
    Peer(f"expert-tensor-parallel{_SIZE}", "--etp"),
    Peer(f"expert-(model-)?parallel(ism)?{_SIZE}|ep-(size|degree)", "--ep"),
    Peer("num-(local-|routed-)?experts|n-routed-experts|moe-num-experts", "--experts"),
    Peer("num-experts-per-tok(en)?|moe-(router-)?top-?k|router-top-?k", "--top-k"),
    Peer("moe-(ffn-hidden|intermediate)-size|expert-(ffn|intermediate)-.*", "--expert-ffn"),
    Peer("(moe-)?shared-expert(s)?-.*|n-shared-experts|num-shared-experts", "--shared-ffn"),
    Peer("(moe-|router-)?aux-loss(-.*)?|router-aux-loss-coef", "--balance-loss"),
    Peer("moe-z-loss(-.*)?", "--router-z-loss"),
    Peer("(lm-|softmax-)?(z-loss|logit-z)-(coeff?|weight|multiplier).*", "--z-loss"),
    Peer("label-smoothing-(factor|epsilon|value)", "--label-smoothing"),
    Peer("(moe-expert-)?capacity-factor|moe-expert-capacity(-.*)?", "--expert-capacity"),
    Peer("first-k-dense-replace", "--first-dense"),
    Peer("(moe-layer-freq|decoder-sparse-step)", "--sparse-every"),
    Peer("mlp-only-layers", "--dense-layers"),
    Peer("clip-qkv", "--qkv-clip"),
    Peer("moe(-.*)?|router-.*", "--experts"),
    Peer("vpp(-.*)?|(num-)?virtual-.*|num-layers-per-virtual-.*|interleav.*", "--vpp", "virtual pipeline stages"),
    Peer("(use-)?((torch|megatron|custom)-)?fsdp2?(-.*)?|hsdp|fully-shard.*|data-parallel-shard.*", "--sharding fsdp"),
    Peer("zero-?3(-.*)?", "--sharding fsdp"),
    Peer("zero-?2(-.*)?", "--sharding zero2"),
    Peer("zero-?(stage|level)", "--sharding zero1 (stage 3 is fsdp)"),
    Peer(
        "zero[123]?(-.*)?|deepspeed(-.*)?|(use-)?distributed-optimizer|overlap-param-gather.*|shard-optimizer.*",
        "--sharding zero1",
    ),
    Peer("offload-optimizer(-.*)?|(optimizer-)?cpu-offload(-.*)?|optimizer-offload(-.*)?", "--optimizer-cpu-offload"),
    Peer("(cpu-|fine-grained-)?activation-(cpu-)?offload(ing)?(-.*)?|cpu-offloading(-.*)?", "--recompute offload"),
    Peer("(use-)?((cpu|param|parameter)s?-)*offload(ing)?(-.*)?", None, "offload of weights to the CPU"),
    Peer("main-params-dtype|(no-)?store-param-remainders|master-weights?(-.*)?", "--masters"),
    Peer("exp-avg(-sq)?-dtype|use-precision-aware-optimizer", "--moments"),
    Peer("fp16(-.*)?|half|((initial|min)-)?loss-scal.*", None, "fp16 with loss scaling (bf16 needs none)"),
    Peer("bf16|bfloat16", "--dtype bf16"),
    Peer("precision|mixed-precision(-.*)?|torch-dtype|params-dtype", "--dtype"),
    Peer("fp8-(format|recipe|mode|hybrid)|float8(-.*)?", "--fp8"),
    Peer("multi-latent-attention|mla", "--kv-lora-rank", "multi-head latent attention"),
    Peer("qk-(pos-emb|rope)-head-dim", "--rope-head-dim"),
    Peer("qk-(nope-)?head-dim", "--head-dim"),
    Peer("(q|)lora(-r|-dim)?|peft(-.*)?", "--lora-rank"),
    Peer("mtp-loss-scaling-factor", "--mtp-loss"),
    Peer("mtp(-.*)?|num-nextn-predict-layers", "--mtp-layers", "multi-token prediction"),
    Peer("window-(size|attn.*)|sliding-window(-.*)?", "--window"),
    Peer("sgd-momentum", "--momentum"),
    Peer("sgd(-.*)?|lion|use-lion", "--optimizer"),
    Peer("async-checkpoint.*", "--async-save"),
    Peer("muon-momentum", "--momentum"),
    Peer("muon(-.*)?", "--optimizer"),
    Peer("adafactor", None, "this optimizer"),
    Peer("(enable-|external-|use-)?cuda-graph(-.*)?|(enable-|external-|use-)cuda-graphs(-.*)?", "--cuda-graphs"),
    Peer("(num|n)-(hidden-)?layers?", "--layers"),
    Peer("hidden-(size|dim)|d-model|n-embd|embed-dim", "--hidden"),
    Peer("(num|n)-(attention-)?heads?", "--heads"),
    Peer("num-query-groups|num-key-value-heads|n(um)?-kv-heads|group-query-attention", "--kv-heads"),
    Peer("kv-channels|head-size", "--head-dim"),
    Peer("ffn-hidden-size|intermediate-size", "--ffn"),
    Peer("vocab-size|padded-vocab-size", "--vocab"),
    Peer("seq(uence)?-length|max-seq(uence)?-len(gth)?|context-length|block-size|max-position-embeddings", "--seq-len"),
    Peer("micro-batch-size|(local|per-device-train|per-gpu)-batch-size|train-micro-batch-size(-.*)?", "--micro-batch"),
    Peer("batch(-?size)?|bs", "--global-batch (of an update) or --micro-batch (of a rank)"),
    Peer("(global|train)-batch-size|gradient-accumulation-steps", "--global-batch"),
    Peer("(train|max|num)-(iters|iterations|(train-)?steps)|training-steps", "--steps"),
    Peer("learning-rate", "--lr"),
    Peer("lr-decay-style|lr-scheduler(-type)?", "--lr-schedule"),
    Peer("lr-warmup-(iters|steps)|num-warmup-steps|warmup-iters", "--warmup-steps"),
    Peer("lr-decay-(iters|steps)", "--decay-steps"),
    Peer("adam-beta1", "--beta1"),
    Peer("adam-beta2", "--beta2"),
    Peer("adam-eps(ilon)?", "--eps"),
    Peer("max-grad-norm|gradient-clipping|grad(ient)?-clip(-.*)?", "--clip-grad"),
    Peer("rotary-base|rope-theta", "--rope-base"),
    Peer("normalization|norm-type", "--norm"),
    Peer("position-embedding-type|use-rotary-position-embeddings", "--position"),
    Peer("swiglu", "--activation swiglu"),
    Peer("tie-(word-)?embeddings|(tie|share)-embeddings-.*", "--tied"),
    Peer("hidden-dropout", "--dropout"),
    Peer("recompute-.*|(activation|gradient)-checkpoint.*|ac-mode", "--recompute"),
    Peer("(use-)?flash-att(entio)?n.*|attn-implementation|attention-backend", "--attention"),
    Peer("torch-compile|use-compile", "--compile"),
    Peer("pipeline-(parallel-)?schedule", "--schedule"),
    Peer("save|save-dir|output-dir", "--out"),
    Peer("load|resume-from-checkpoint", "--resume"),
    Peer("save-(interval|steps)|checkpoint-interval", "--save-every"),
    Peer("eval-(interval|steps)", "--eval-every"),
    Peer("eval-iters", "--eval-batches"),
    Peer("log(ging)?-(interval|steps)", "--log-every"),
    Peer("data-path|dataset(-path)?", "--data"),
    Peer("tokenizer-(model|type|path|name.*)", "--tokenizer"),
    Peer("nproc-per-node|num-(gpus|processes)|world-size", "--nproc"),
)

CHOICES: tuple[PeerChoice, ...] = (
    PeerChoice("sharding", "optim|distributed-optimizer|zero-1|1", "zero1"),
    PeerChoice("sharding", "optim_grads|shard_grad_op|zero-2|2", "zero2"),
    PeerChoice("sharding", "optim_grads_params|full(_shard)?|fully.*|fsdp2|zero-?3|3", "fsdp"),
    PeerChoice("sharding", "no_shard|ddp|replicate|0", "none"),
    PeerChoice("optimizer", "adam|adamw_.*|fused_?adamw?", "adamw"),
    PeerChoice("optimizer", "adafactor|shampoo|soap|adamuon", "adamw", "this optimizer"),
    PeerChoice("device", "gpu", "cuda"),
    PeerChoice("device", "rocm|hip|xpu|tpu|mps|npu|hpu", None, "other devices than NVIDIA's GPUs and the CPU"),
    PeerChoice("dtype", "float64|double", "fp64"),
    PeerChoice("dtype", "float32|float", "fp32"),
    PeerChoice("dtype", "bfloat16|bf16-mixed", "bf16"),
    PeerChoice("dtype", "fp16|float16|half|16-mixed", "bf16", "fp16 with loss scaling (bf16 needs none)"),
    PeerChoice("dtype", "fp8|float8|e4m3|e5m2", "bf16", "fp8 as the dtype of all (--fp8 beside bf16 is)"),
    PeerChoice("fp8", "delayed|hybrid|e4m3|blockwise|mx(fp8)?|nvfp4", "tensorwise", "this recipe"),
    PeerChoice("position", "rotary", "rope"),
    PeerChoice("position", "learned[_-]absolute|absolute", "learned"),
    PeerChoice("position", "alibi|sinusoidal|none|nope|yarn|mrope", "rope", "this kind of positions"),
    PeerChoice("norm", "rms[_-]?norm", "rms"),
    PeerChoice("norm", "layer[_-]?norm|ln", "layer"),
    PeerChoice("activation", "silu|swish", "swiglu"),
    PeerChoice("activation", "relu|squared-relu|relu2|reglu|quick-gelu", "gelu", "this activation"),
    PeerChoice("schedule", "interleaved-?1f1b|vpp|virtual.*", "interleaved"),
    PeerChoice("schedule", "interleaved-?zero-?bubble", "interleaved-zb"),
    PeerChoice("schedule", "loop(ed)?bfs|breadth-?first", "looped-bfs"),
    PeerChoice("schedule", "zbv-?zero-?bubble|v-?zb|zb-v", "zbv"),
    PeerChoice("schedule", "zb-?1p|zero-?bubble", "zb-h1"),
    PeerChoice("schedule", "zb-?2p", "zb-h2"),
    PeerChoice("schedule", "dual-?pipe(-v)?", "dualpipev"),
    PeerChoice("schedule", "chimera|hanayo|bitpipe", "1f1b", "this schedule"),
    PeerChoice("recompute", "full", "block"),
    PeerChoice("attention", "flash_?(attention_?)?[23]?|fused|sdpa|eager|unfused|auto|local", "torch"),
    PeerChoice("cp_comm", "p2p", "ring"),
    PeerChoice("cp_comm", "all_?gather", "all-gather"),
    PeerChoice("cp_comm", "a2a", "ulysses"),
    PeerChoice("cp_comm", r"a2a\+p2p|usp", "hybrid"),
    PeerChoice("lr_schedule", "inverse[_-]square[_-]root|polynomial|exponential", "cosine", "this schedule"),
)


def flag_of(name: str, flags: Container[str]) -> str | None:
    """How the rejection of a flag goes on that other programs have, by its name without dashes before it."""
    for peer in FLAGS:
        if re.fullmatch(peer.names, name.lower().replace("_", "-")):
            if peer.ours is None:
                return f"; {peer.feature}: not available yet"
            return (
                f"; did you mean {peer.ours}?" if peer.ours.split()[0] in flags else f"; in training it is {peer.ours}"
            )
    return None


def choice_of(setting: str, word: str) -> PeerChoice | None:
    """What another program's choice for one of our settings stands for."""
    rows = (peer for peer in CHOICES if peer.setting == setting)
    return next((peer for peer in rows if re.fullmatch(peer.names, word.lower())), None)
