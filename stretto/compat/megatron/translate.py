"""From Megatron-LM's flags to settings: what goes over, what changes nothing, what cannot be had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from stretto.arguments.errors import Violation
from stretto.arguments.setting import Value
from stretto.arguments.tree import settings
from stretto.arguments.values import nearest
from stretto.compat.megatron.bash import marks
from stretto.compat.megatron.experts import CAPACITY
from stretto.compat.megatron.flags import (
    BY_HAND,
    DEFAULTS,
    LEARNING_RATE,
    MISSING,
    ONLY,
    RECOMPUTE,
    REQUIRED,
    SAME,
    SWITCHES,
    UNSAID,
)
from stretto.compat.megatron.given import Given, RejectedError, Setting, UnfilledError, one, value
from stretto.compat.megatron.moot import MOOT
from stretto.compat.megatron.rules import BARE, COMPUTED, NEVER, Rule, global_batch


@dataclass(frozen=True)
class Translation:
    """Settings by path with the flags they come from, and what could not be told by settings.

    `notes`: where the settings come near to what the flags say and are not quite the same.
    """

    values: Mapping[str, tuple[Value, str]]
    moot: Mapping[str, str]
    manual: Mapping[str, str]
    rejected: tuple[Violation, ...]
    notes: tuple[str, ...] = ()


def translate(words: Sequence[Sequence[str]], *, processes: int | None = None) -> Translation:
    """Translate flags, each with its values; of flags that are repeated the last counts.

    `processes`: of the run, where it is known; the global batch follows from it where no flag says it.
    """
    given = {_spelled(flag): tuple(values) for flag, *values in words}
    values: dict[str, tuple[Value, str]] = {p: (v, "Megatron-LM's default") for p, v in DEFAULTS.items()}
    rejected = [_rejection(flag, MISSING[flag]) for flag in given if flag in MISSING]
    rejected += [_unknown(flag) for flag in given if flag not in _KNOWN and not marks(flag)]
    rejected += [
        _rejection(flag, "is missing, and Megatron-LM has no default for it")
        for flag in REQUIRED
        if flag not in given and not _open(words)
    ]
    rejected += [_rejection(f, f"takes no value, got {' '.join(v)}") for f, v in given.items() if _overfull(f, v)]
    rules: list[Rule] = [partial(_copied, flag=flag) for flag in (*SAME, *SWITCHES) if flag in given]
    rules += [partial(_only, flag=flag) for flag in ONLY if flag in given]
    rules += [*COMPUTED, partial(global_batch, processes=processes)]
    for rule in rules:
        try:
            for path, value, why in rule(given):
                values[path] = value, why
        except RejectedError as error:
            rejected.append(_rejection(*error.args))
        except UnfilledError:
            pass
    if values.get("run.eval_every") == (0, NEVER):
        values.pop("run.eval_batches", None)
    if values.get("optimizer.optimizer", ("", ""))[0] == "sgd":  # which does not look at what Adam alone has
        for path in ("optimizer.beta1", "optimizer.beta2", "optimizer.eps"):
            values.pop(path, None)
    return Translation(
        values,
        {flag: MOOT[flag] for flag in given if flag in MOOT} | {flag: ONLY[flag][1] for flag in given if flag in ONLY},
        {flag: BY_HAND[flag] for flag in given if flag in BY_HAND},
        tuple(rejected),
        tuple(_notes(given, values["data.held_out"][0])),
    )


def _open(words: Sequence[Sequence[str]]) -> bool:
    """Whether some word could still be any flag."""
    return any(not word.strip(marks(word)) for flag in words for word in flag if marks(word))


def _overfull(flag: str, values: Sequence[str]) -> bool:
    return bool(values) and flag in BARE and not marks("".join(values))


def _notes(g: Given, held_out: Value) -> Iterator[str]:
    yield LEARNING_RATE
    for flag, path in UNSAID.items():
        if not any(other in g for other in (flag, flag.replace("-iters", "-samples"))):
            ours = f"{path} = {settings()[path].default}"
            yield f"{flag} is not said, and Megatron-LM has no default for it: {ours} counts"
    if "--recompute-activations" in g or g.get("--recompute-granularity") == ("selective",):
        yield RECOMPUTE
    if "--moe-expert-capacity-factor" in g:
        yield CAPACITY
    if g.get("--eval-iters") == ("0",) and held_out:
        yield "--eval-iters 0: nothing is evaluated until the run ends; what --split keeps back is then"
    if {"--openai-gelu", "--no-bias-gelu-fusion"} <= set(g) and "--swiglu" not in g:
        yield "--openai-gelu counts for Megatron-LM's legacy models alone; its core computes gelu, the exact form"


def _spelled(flag: str) -> str:
    """torchrun takes underscores and dashes alike."""
    dashed = flag.replace("_", "-")
    return dashed if dashed in MOOT else flag


def _rejection(flag: str, problem: str) -> Violation:
    return Violation("megatron", (), f"{flag}: {problem}")


def _unknown(flag: str) -> Violation:
    near = nearest(flag, sorted(_KNOWN))
    return _rejection(flag, f"is not known{f'; did you mean {near}?' if near else ''}")


def _copied(g: Given, flag: str) -> Iterator[Setting]:
    if flag in SWITCHES:
        yield *SWITCHES[flag], flag
    else:
        yield SAME[flag], value(g, flag, SAME[flag]), flag


def _only(g: Given, flag: str) -> Iterator[Setting]:
    known, reason = ONLY[flag]
    if (said := one(g, flag)) not in known:
        raise RejectedError(flag, f"{said!r} is not available: {reason}")
    yield from ()


_KNOWN = frozenset((*SAME, *SWITCHES, *ONLY, *MOOT, *BY_HAND, *MISSING, *chain(*COMPUTED.values())))
