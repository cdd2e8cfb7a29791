"""What settings Megatron-LM's flags stand for, where that takes more than copying a value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping

from stretto.compat.megatron.context import COMM, LEVELS, context
from stretto.compat.megatron.experts import FLAGS as EXPERT_FLAGS
from stretto.compat.megatron.experts import SWITCHED, experts
from stretto.compat.megatron.flags import DEFAULTS, SWITCHES
from stretto.compat.megatron.given import Given, RejectedError, Setting, choice, number, one, positive, value
from stretto.compat.megatron.optimizer import AWARE, OFFLOAD, OPTIMIZER_FLAGS, optimizer
from stretto.compat.megatron.pipeline import ENDS, interleaved, stages

Rule = Callable[[Given], Iterator[Setting]]


def _architecture(g: Given) -> Iterator[Setting]:
    if "--normalization" in g:
        norms = {"RMSNorm": "rms", "LayerNorm": "layer"}
        yield "model.norm", choice(g, "--normalization", norms), "--normalization"
    swiglu = "--swiglu" in g
    yield "model.activation", *_activation(g)
    if "--ffn-hidden-size" in g:
        yield "model.ffn", value(g, "--ffn-hidden-size", "model.ffn"), "--ffn-hidden-size"
    elif swiglu and "--hidden-size" in g:
        # Megatron-LM rounds 8h/3 down to a multiple of 64, Stretto's own default rounds up.
        yield "model.ffn", int(4 * number(g, "--hidden-size") * 2 / 3 / 64) * 64, "--hidden-size with --swiglu"


def _activation(g: Given) -> tuple[str, str]:
    """Megatron-LM's GELU is exact by itself; what it fuses with a bias, by default, is the tanh form."""
    if "--swiglu" in g:
        return "swiglu", "--swiglu"
    if "--openai-gelu" in g:
        return "gelu-tanh", "--openai-gelu"
    for flag in ("--no-bias-gelu-fusion", "--disable-bias-linear"):
        if flag in g:
            return "gelu", f"no --swiglu; {flag}"
    return "gelu-tanh", "no --swiglu; GELU fused with a bias"


def _attention(g: Given) -> Iterator[Setting]:
    if "--group-query-attention" in g:
        groups = value(g, "--num-query-groups", "model.kv_heads") if "--num-query-groups" in g else 1
        yield "model.kv_heads", groups, "--group-query-attention"


def _positions(g: Given) -> Iterator[Setting]:
    rotary = "--use-rotary-position-embeddings" in g
    known = {"learned_absolute": "learned", "rope": "rope"}
    kind = choice(g, "--position-embedding-type", known) if "--position-embedding-type" in g else "learned"
    yield "model.position", "rope" if rotary else kind, "--position-embedding-type"
    if (rotary or kind == "rope") and "--rotary-base" in g:
        yield "model.rope_base", value(g, "--rotary-base", "model.rope_base"), "--rotary-base"
    if (rotary or kind == "rope") and "--rotary-percent" in g and number(g, "--rotary-percent") != 1:
        yield "model.rope_share", value(g, "--rotary-percent", "model.rope_share"), "--rotary-percent"


def _stretched(g: Given) -> Iterator[Setting]:
    """Longer contexts: Llama 3's stretch of slow wavelengths, from 8,192 positions in Megatron-LM, or one of all."""
    llama, factor, linear = "--use-rope-scaling", "--rope-scaling-factor", "--rotary-seq-len-interpolation-factor"
    rotary = "--use-rotary-position-embeddings" in g or g.get("--position-embedding-type") == ("rope",)
    if llama in g and linear in g:
        raise RejectedError(llama, f"and {linear} stretch twice: say one of them")
    if rotary and llama in g:
        yield "model.rope_scaling", "llama3", llama
        yield "model.rope_factor", number(g, factor) if factor in g else 8.0, factor if factor in g else f"no {factor}"
        yield "model.rope_original_positions", 8192, llama
    elif rotary and linear in g and number(g, linear) != 1:
        yield "model.rope_scaling", "linear", linear
        yield "model.rope_factor", number(g, linear), linear


def _sequence_parallel(g: Given) -> Iterator[Setting]:
    tp = number(g, "--tensor-model-parallel-size") if "--tensor-model-parallel-size" in g else 1
    if "--sequence-parallel" in g and tp > 1:  # Megatron-LM drops it in silence at tp = 1
        yield "parallel.sequence_parallel", True, "--sequence-parallel"


def _attention_dropout(g: Given) -> Iterator[Setting]:
    flag = "--attention-dropout"
    if flag not in g or number(g, flag) != 0:
        raise RejectedError(flag, f"attention weights are not dropped: say {flag} 0 (Megatron-LM's default is 0.1)")
    yield from ()


def _recompute(g: Given) -> Iterator[Setting]:
    if (flag := "--recompute-granularity") in g:
        yield "run.recompute", choice(g, flag, {"full": "block", "selective": "selective"}), flag
    elif (flag := "--recompute-activations") in g:
        yield "run.recompute", "selective", flag


def _fp8(g: Given) -> Iterator[Setting]:
    form, recipe = "--fp8-format", "--fp8-recipe"
    if form not in g:  # Megatron-LM reads the recipe with a format alone
        return
    if recipe not in g or one(g, recipe) == "delayed":
        raise RejectedError(form, f"delayed scaling, Megatron-LM's default, is not available: say {recipe} tensorwise")
    if one(g, recipe) in ("blockwise", "mxfp8", "nvfp4"):
        raise RejectedError(recipe, f"{one(g, recipe)!r} is not available: say {recipe} tensorwise, or --fp8 rowwise")
    kind = choice(g, recipe, {"tensorwise": "tensorwise"})
    choice(g, form, {"hybrid": "hybrid"})  # e4m3, and e5m2 for gradients of activations
    yield "run.fp8", kind, f"{form} and {recipe}"


def _steps(g: Given, name: str) -> int | None:
    """A length that is given in iterations or in samples."""
    if f"{name}-iters" in g:
        return round(number(g, f"{name}-iters"))
    if f"{name}-samples" not in g:
        return None
    if "--global-batch-size" not in g:
        raise RejectedError(f"{name}-samples", "needs --global-batch-size")
    return int(number(g, f"{name}-samples") // positive(g, "--global-batch-size"))


def _length(g: Given) -> Iterator[Setting]:
    if steps := _steps(g, "--train"):
        yield "run.steps", steps, "--train-iters or --train-samples"


def _learning_rate(g: Given) -> Iterator[Setting]:
    styles = {"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"}
    style = choice(g, "--lr-decay-style", styles) if "--lr-decay-style" in g else "linear"
    yield "optimizer.lr_schedule", style, "--lr-decay-style"
    decay = _steps(g, "--lr-decay")
    if decay and style != "constant":
        yield "optimizer.decay_steps", decay, "--lr-decay-iters or --lr-decay-samples"
    if "--lr-warmup-fraction" in g:
        whole = decay or _steps(g, "--train") or 0
        yield "optimizer.warmup_steps", round(number(g, "--lr-warmup-fraction") * whole), "--lr-warmup-fraction"
    elif warmup := _steps(g, "--lr-warmup"):
        yield "optimizer.warmup_steps", warmup, "--lr-warmup-iters or --lr-warmup-samples"
    if style == "wsd" and (cooldown := _steps(g, "--lr-wsd-decay")):
        yield "optimizer.cooldown_steps", cooldown, "--lr-wsd-decay-iters or --lr-wsd-decay-samples"
        choice(g, "--lr-wsd-decay-style", {"linear": "linear"}, default="exponential")


def _split(g: Given) -> Iterator[Setting]:
    if "--split" in g:
        yield "data.held_out", held_out(g), "--split"
    if "--eval-iters" in g and number(g, "--eval-iters") == 0:
        yield "run.eval_every", 0, NEVER
    elif "--eval-iters" in g:
        yield "run.eval_batches", value(g, "--eval-iters", "run.eval_batches"), "--eval-iters"
    if "--split" in g and held_out(g) == 0:
        yield "run.eval_every", 0, NEVER if "--eval-iters" in g and number(g, "--eval-iters") == 0 else "--split"


def held_out(g: Given) -> float:
    """What is not trained on; whatever stands between the numbers, Megatron-LM passes over."""
    if "--split" not in g:
        return float(str(DEFAULTS["data.held_out"]))
    said = one(g, "--split")
    shares = [float(share) for share in re.findall(r"\d+\.?\d*|\.\d+", said)]
    if re.search(r"[^\d.,/'\"\s:]", said) or not shares or len(shares) > 3:
        raise RejectedError("--split", f"{said!r} is not one to three numbers, as in 969,30,1")
    if not shares[0] or not math.isfinite(sum(shares)):
        raise RejectedError("--split", f"{said!r} leaves nothing to train on; say, for example, --split 969,30,1")
    return round(sum(shares[1:]) / sum(shares), 6)


def global_batch(g: Given, processes: int | None) -> Iterator[Setting]:
    """Megatron-LM's default: one microbatch for each data-parallel rank."""
    if "--global-batch-size" in g or "--micro-batch-size" not in g:
        return
    sizes = [positive(g, flag) if flag in g else 1 for flag in _CUTS]
    cut, product = math.prod(sizes), "*".join(map(str, sizes))
    flag, micro = "--global-batch-size", positive(g, "--micro-batch-size")
    if processes is None:
        needs = f"Megatron-LM's default, micro batch * dp, needs dp: say {flag} {micro} times dp"
        raise RejectedError(flag, f"is missing; {needs}")
    if processes % cut:
        rest = f"{processes} processes / (tp*pp*cp = {product}) is not whole"
        raise RejectedError(flag, f"is missing, and micro batch * dp has no dp: {rest}")
    dp = processes // cut
    yield "batch.global_batch", micro * dp, f"no {flag}: --micro-batch-size * dp = {micro} * {dp}"


def _clock(g: Given) -> Iterator[Setting]:
    for flag, path in (
        ("--distributed-timeout-minutes", "run.timeout"),
        ("--exit-duration-in-mins", "run.exit_duration"),
    ):
        if flag in g:
            yield path, 60 * number(g, flag), flag


def _streams(g: Given) -> Iterator[Setting]:
    flag, known = "--high-priority-stream-groups", {"tp": "tp", "cp": "cp", "pp": "pp", "dp": "dp", "dp_cp": "dp-cp"}
    if flag not in g:
        return
    if unknown := [name for name in g[flag] if name not in known]:
        raise RejectedError(flag, f"{', '.join(unknown)}: not available; there is {', '.join(known)}")
    yield "nccl.high_priority", tuple(known[name] for name in g[flag]), flag


def _sharding(g: Given) -> Iterator[Setting]:
    whole, fsdp, strategy = "--use-distributed-optimizer", "--use-megatron-fsdp", "--data-parallel-sharding-strategy"
    if fsdp in g:  # without it Megatron-LM does not read the strategy
        yield "parallel.sharding", choice(g, strategy, _STRATEGIES, "no_shard"), f"{fsdp} and {strategy}"
    elif torch := [flag for flag in ("--use-torch-fsdp2",) if flag in g]:
        yield "parallel.sharding", "fsdp", torch[0]
    elif whole in g:
        yield "parallel.sharding", "zero1", whole


def _further(g: Given) -> Iterator[Setting]:
    """Multi-token prediction; the weight of its losses has another default there."""
    layers, weight = "--mtp-num-layers", "--mtp-loss-scaling-factor"
    if layers not in g:
        return
    yield "model.mtp_layers", positive(g, layers), layers
    yield "model.mtp_loss", number(g, weight) if weight in g else 0.1, weight if weight in g else f"no {weight}"


_STRATEGIES = {"no_shard": "none", "optim": "zero1", "optim_grads": "zero2", "optim_grads_params": "fsdp"}
_READS: Mapping[Rule, str] = {
    _architecture: "--normalization --swiglu --openai-gelu --no-bias-gelu-fusion --ffn-hidden-size",
    _attention: "--group-query-attention --num-query-groups",
    _positions: "--position-embedding-type --use-rotary-position-embeddings --rotary-base --rotary-percent",
    _stretched: "--use-rope-scaling --rope-scaling-factor --rotary-seq-len-interpolation-factor",
    _sequence_parallel: "--sequence-parallel",
    _attention_dropout: "--attention-dropout",
    _recompute: "--recompute-granularity --recompute-activations",
    _fp8: "--fp8-format --fp8-recipe",
    _length: "--train-iters --train-samples --lr-decay-iters --lr-decay-samples --lr-warmup-iters --lr-warmup-samples",
    _learning_rate: "--lr-decay-style --lr-warmup-fraction --lr-wsd-decay-iters --lr-wsd-decay-samples "
    "--lr-wsd-decay-style",
    _split: "--split --eval-iters",
    context: f"{COMM} {LEVELS}",
    interleaved: "--num-virtual-stages-per-pipeline-rank --num-layers-per-virtual-pipeline-stage "
    "--microbatch-group-size-per-virtual-pipeline-stage",
    stages: " ".join(("--pipeline-model-parallel-layout", *ENDS)),
    _streams: "--high-priority-stream-groups",
    _clock: "--distributed-timeout-minutes --exit-duration-in-mins",
    optimizer: " ".join(OPTIMIZER_FLAGS),
    experts: " ".join(EXPERT_FLAGS),
    _further: "--mtp-num-layers --mtp-loss-scaling-factor",
    _sharding: "--use-distributed-optimizer --use-megatron-fsdp --use-torch-fsdp2 --data-parallel-sharding-strategy",
}
COMPUTED: Mapping[Rule, tuple[str, ...]] = {read: tuple(flags.split()) for read, flags in _READS.items()}
"""Settings that take more than copying, and the flags that they read."""

NEVER = "--eval-iters 0"
_CUTS = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")

BARE = frozenset(
    [
        *SWITCHED,
        *(*SWITCHES, "--swiglu", "--openai-gelu", "--no-bias-gelu-fusion", "--group-query-attention"),
        *(OFFLOAD, AWARE, "--sequence-parallel", "--use-rotary-position-embeddings", "--recompute-activations"),
        "--use-rope-scaling",
        *("--use-distributed-optimizer", "--use-megatron-fsdp", "--use-torch-fsdp2", "--overlap-param-gather"),
    ]
)
"""Flags without a value: what stands behind one belongs to no flag."""
