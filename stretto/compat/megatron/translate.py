"""From Megatron-LM's flags to settings: what goes over, what changes nothing, what cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from stretto.arguments.errors import Violation
from stretto.arguments.setting import Value
from stretto.arguments.tree import settings
from stretto.arguments.values import from_text, nearest
from stretto.compat.megatron.flags import BY_HAND, DEFAULTS, MISSING, MOOT, SAME, SWITCHES

Given = Mapping[str, Sequence[str]]
"""Flags with their values."""

Setting = tuple[str, Value, str]
"""Path, value, and the flags that say so."""

Rule = Callable[[Given], Iterator[Setting]]


@dataclass(frozen=True)
class Translation:
    """Settings by path with the flags they come from, and what could not be told by settings."""

    values: Mapping[str, tuple[Value, str]]
    moot: Mapping[str, str]
    by_hand: Mapping[str, str]
    refused: tuple[Violation, ...]


class _RefusedError(Exception):
    """Something that a flag asks for and that cannot be had."""


def translate(words: Sequence[Sequence[str]]) -> Translation:
    """Translate flags, each with its values; of flags that are repeated the last counts."""
    given = {_spelled(flag): tuple(values) for flag, *values in words}
    values: dict[str, tuple[Value, str]] = {p: (v, "Megatron-LM's default") for p, v in DEFAULTS.items()}
    refused = [_refusal(flag, MISSING[flag]) for flag in given if flag in MISSING]
    refused += [_unknown(flag) for flag in given if flag not in _KNOWN]
    rules: list[Rule] = [partial(_copied, flag=flag) for flag in (*SAME, *SWITCHES) if flag in given]
    for rule in (*rules, *COMPUTED):
        try:
            for path, value, why in rule(given):
                values[path] = value, why
        except _RefusedError as error:
            refused.append(_refusal(*error.args))
    return Translation(
        values,
        {flag: MOOT[flag] for flag in given if flag in MOOT},
        {flag: BY_HAND[flag] for flag in given if flag in BY_HAND},
        tuple(refused),
    )


def _spelled(flag: str) -> str:
    """torchrun takes underscores and dashes alike."""
    dashed = flag.replace("_", "-")
    return dashed if dashed in MOOT else flag


def _refusal(flag: str, problem: str) -> Violation:
    return Violation("megatron", (), f"{flag}: {problem}")


def _unknown(flag: str) -> Violation:
    near = nearest(flag, sorted(_KNOWN))
    return _refusal(flag, f"is not known{f'; did you mean {near}?' if near else ''}")


def _copied(g: Given, flag: str) -> Iterator[Setting]:
    if flag in SWITCHES:
        yield *SWITCHES[flag], flag
    else:
        yield SAME[flag], _value(g, flag, SAME[flag]), flag


def _value(g: Given, flag: str, path: str) -> Value:
    """The value of a flag, read as the setting's type."""
    try:
        return from_text(settings()[path], _one(g, flag))
    except ValueError as error:
        raise _RefusedError(flag, str(error)) from error


def _one(g: Given, flag: str) -> str:
    values = g[flag]
    if len(values) != 1:
        raise _RefusedError(flag, f"takes one value, got {len(values)}")
    if "$" in values[0]:
        raise _RefusedError(flag, f"the value of {values[0]} is not known here")
    return values[0]


def _number(g: Given, flag: str) -> float:
    said = _one(g, flag)
    try:
        return float(said)
    except ValueError as error:
        raise _RefusedError(flag, f"{said!r} is not a number") from error


def _architecture(g: Given) -> Iterator[Setting]:
    if "--normalization" in g:
        norms = {"RMSNorm": "rms", "LayerNorm": "layer"}
        yield "model.norm", _choice(g, "--normalization", norms), "--normalization"
    swiglu = "--swiglu" in g
    yield "model.activation", *_activation(g)
    if "--ffn-hidden-size" in g:
        yield "model.ffn", _value(g, "--ffn-hidden-size", "model.ffn"), "--ffn-hidden-size"
    elif swiglu and "--hidden-size" in g:
        # Megatron-LM rounds 8h/3 down to a multiple of 64, Stretto's own default rounds up.
        yield "model.ffn", int(4 * _number(g, "--hidden-size") * 2 / 3 / 64) * 64, "--hidden-size with --swiglu"


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
        groups = _value(g, "--num-query-groups", "model.kv_heads") if "--num-query-groups" in g else 1
        yield "model.kv_heads", groups, "--group-query-attention"


def _positions(g: Given) -> Iterator[Setting]:
    rotary = "--use-rotary-position-embeddings" in g
    known = {"learned_absolute": "learned", "rope": "rope"}
    kind = _choice(g, "--position-embedding-type", known) if "--position-embedding-type" in g else "learned"
    yield "model.position", "rope" if rotary else kind, "--position-embedding-type"
    if (rotary or kind == "rope") and "--rotary-base" in g:
        yield "model.rope_base", _value(g, "--rotary-base", "model.rope_base"), "--rotary-base"
    if "--rotary-percent" in g and _number(g, "--rotary-percent") != 1:
        raise _RefusedError("--rotary-percent", "all dimensions of a head are turned")


def _sequence_parallel(g: Given) -> Iterator[Setting]:
    tp = _number(g, "--tensor-model-parallel-size") if "--tensor-model-parallel-size" in g else 1
    if "--sequence-parallel" in g and tp > 1:  # Megatron-LM drops it in silence at tp = 1
        yield "parallel.sequence_parallel", True, "--sequence-parallel"


def _attention_dropout(g: Given) -> Iterator[Setting]:
    flag = "--attention-dropout"
    if flag not in g or _number(g, flag) != 0:
        raise _RefusedError(flag, f"attention weights are not dropped: say {flag} 0 (Megatron-LM's default is 0.1)")
    yield from ()


def _recompute(g: Given) -> Iterator[Setting]:
    if (flag := "--recompute-granularity") in g:
        yield "run.recompute", _choice(g, flag, {"full": "block"}), flag


def _fp8(g: Given) -> Iterator[Setting]:
    form, recipe = "--fp8-format", "--fp8-recipe"
    if form not in g:  # Megatron-LM reads the recipe with a format alone
        return
    if recipe not in g or _one(g, recipe) == "delayed":
        raise _RefusedError(form, f"delayed scaling, Megatron-LM's default, is not available: say {recipe} tensorwise")
    kind = _choice(g, recipe, {"tensorwise": "tensorwise"})
    _choice(g, form, {"hybrid": "hybrid"})  # e4m3, and e5m2 for gradients of activations
    yield "run.fp8", kind, f"{form} and {recipe}"


def _steps(g: Given, name: str) -> int | None:
    """A length that is given in iterations or in samples."""
    if f"{name}-iters" in g:
        return round(_number(g, f"{name}-iters"))
    if f"{name}-samples" not in g:
        return None
    if "--global-batch-size" not in g:
        raise _RefusedError(f"{name}-samples", "needs --global-batch-size")
    return int(_number(g, f"{name}-samples") // _number(g, "--global-batch-size"))


def _length(g: Given) -> Iterator[Setting]:
    if steps := _steps(g, "--train"):
        yield "run.steps", steps, "--train-iters or --train-samples"


def _learning_rate(g: Given) -> Iterator[Setting]:
    styles = {"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"}
    style = _choice(g, "--lr-decay-style", styles) if "--lr-decay-style" in g else "linear"
    yield "optimizer.lr_schedule", style, "--lr-decay-style"
    decay = _steps(g, "--lr-decay")
    if decay and style != "constant":
        yield "optimizer.decay_steps", decay, "--lr-decay-iters or --lr-decay-samples"
    if "--lr-warmup-fraction" in g:
        whole = decay or _steps(g, "--train") or 0
        yield "optimizer.warmup_steps", round(_number(g, "--lr-warmup-fraction") * whole), "--lr-warmup-fraction"
    elif warmup := _steps(g, "--lr-warmup"):
        yield "optimizer.warmup_steps", warmup, "--lr-warmup-iters or --lr-warmup-samples"
    if style == "wsd" and (cooldown := _steps(g, "--lr-wsd-decay")):
        yield "optimizer.cooldown_steps", cooldown, "--lr-wsd-decay-iters or --lr-wsd-decay-samples"
        _choice(g, "--lr-wsd-decay-style", {"linear": "linear"}, default="exponential")


def _split(g: Given) -> Iterator[Setting]:
    if "--split" in g:
        train, *rest = (float(share) for share in _one(g, "--split").split(","))
        yield "data.held_out", round(sum(rest) / (train + sum(rest)), 6), "--split"


def _clock(g: Given) -> Iterator[Setting]:
    if "--distributed-timeout-minutes" in g:
        flag = "--distributed-timeout-minutes"
        yield "run.timeout", 60 * _number(g, flag), flag
    if "--exit-duration-in-mins" in g:
        flag = "--exit-duration-in-mins"
        yield "run.exit_duration", 60 * _number(g, flag), flag


def _streams(g: Given) -> Iterator[Setting]:
    flag, known = "--high-priority-stream-groups", {"tp": "tp", "cp": "cp", "pp": "pp", "dp": "dp", "dp_cp": "dp-cp"}
    if flag not in g:
        return
    if unknown := [name for name in g[flag] if name not in known]:
        raise _RefusedError(flag, f"{', '.join(unknown)}: not available; there is {', '.join(known)}")
    yield "nccl.high_priority", tuple(known[name] for name in g[flag]), flag


def _optimizer(g: Given) -> Iterator[Setting]:
    if "--optimizer" in g:
        _choice(g, "--optimizer", {"adam": "adam"})
    yield from ()


def _choice(g: Given, flag: str, known: Mapping[str, str], default: str = "") -> str:
    said = _one(g, flag) if flag in g else default
    if said not in known:
        raise _RefusedError(flag, f"{said!r} is not available; there is {', '.join(known)}")
    return known[said]


_LENGTHS = tuple(f"{name}-{unit}" for name in ("--train", "--lr-decay", "--lr-warmup") for unit in ("iters", "samples"))

COMPUTED: Mapping[Rule, tuple[str, ...]] = {
    _architecture: ("--normalization", "--swiglu", "--openai-gelu", "--no-bias-gelu-fusion", "--ffn-hidden-size"),
    _attention: ("--group-query-attention", "--num-query-groups"),
    _positions: (
        "--position-embedding-type",
        "--use-rotary-position-embeddings",
        "--rotary-base",
        "--rotary-percent",
    ),
    _sequence_parallel: ("--sequence-parallel",),
    _attention_dropout: ("--attention-dropout",),
    _recompute: ("--recompute-granularity",),
    _fp8: ("--fp8-format", "--fp8-recipe"),
    _length: _LENGTHS,
    _learning_rate: (
        "--lr-decay-style",
        "--lr-warmup-fraction",
        "--lr-wsd-decay-iters",
        "--lr-wsd-decay-samples",
        "--lr-wsd-decay-style",
    ),
    _split: ("--split",),
    _streams: ("--high-priority-stream-groups",),
    _clock: ("--distributed-timeout-minutes", "--exit-duration-in-mins"),
    _optimizer: ("--optimizer",),
}
"""Settings that take more than copying, and the flags that they read."""

_KNOWN = frozenset((*SAME, *SWITCHES, *MOOT, *BY_HAND, *MISSING, *chain(*COMPUTED.values())))
