"""Values that follow from others: derived where nothing was said, or given way to something stronger.

Both tables are read in order, by `validate.py`. Each entry states its equation with the numbers, which
becomes the source of the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final

from stretto.arguments.graphs import READS, without_graphs
from stretto.arguments.model_rules import UNUSED, Unused
from stretto.arguments.pipeline import vpp_of
from stretto.arguments.schema import TOKENIZERS, Arguments
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, settings

Equation = Callable[[Arguments], tuple[Value, str] | None]
"""The value and how it came about, or None where it does not apply."""


@dataclass(frozen=True)
class Derivation:
    """The value of a setting that nobody set, from `inputs`; `meaning` is the equation in names."""

    path: str
    inputs: tuple[str, ...]
    meaning: str
    equation: Equation


@dataclass(frozen=True)
class Override:
    """A setting that gives way where a stronger source sets one of `to` to something it does not go with.

    `--tp 1` over a preset with sequence parallelism means: without. Where the setting is said by a source
    at least as strong as those, it is wrong instead: `ineffective` says that it then has no effect; for the
    others a rule of `rules.py` has the words.
    """

    path: str
    to: tuple[str, ...]
    equation: Equation
    ineffective: bool = False


def _sequence_parallel(a: Arguments) -> tuple[Value, str] | None:
    return (False, "tp = 1, nothing to cut") if a.parallel.sequence_parallel and a.parallel.tp == 1 else None


def _no_overlap(a: Arguments) -> tuple[Value, str] | None:
    if not a.parallel.tp_comm_overlap:
        return None
    if a.run.device == "cpu":
        return False, "device = cpu has no copy engines"
    return None if a.parallel.sequence_parallel else (False, "sequence_parallel = false gathers and scatters nothing")


def _rope_base(a: Arguments) -> tuple[Value, str] | None:
    default = settings()["model.rope_base"].default
    unused = a.model.position == "learned" and a.model.rope_base != default
    return (default, "position = learned has no wavelengths") if unused else None


def _unused(a: Arguments, path: str, why: Unused) -> tuple[Value, str] | None:
    default = settings()[path].default
    return (default, why.reason) if why.when(a.model) and get(a, path) != default else None


def _constant_min_lr(a: Arguments) -> tuple[Value, str] | None:
    default = settings()["optimizer.min_lr"].default
    unused = a.optimizer.lr_schedule == "constant" and a.optimizer.min_lr != default
    return (default, "lr_schedule = constant never decays") if unused else None


def _nccl(a: Arguments, path: str) -> tuple[Value, str] | None:
    return ((), "device = cpu has no NCCL") if a.run.device == "cpu" and get(a, path) else None


def _constant_decay(a: Arguments) -> tuple[Value, str] | None:
    unused = a.optimizer.lr_schedule == "constant" and a.optimizer.decay_steps is not None
    return (None, "lr_schedule = constant never decays") if unused else None


def _cooldown_without_wsd(a: Arguments) -> tuple[Value, str] | None:
    unused = a.optimizer.lr_schedule != "wsd" and a.optimizer.cooldown_steps is not None
    return (None, f"lr_schedule = {a.optimizer.lr_schedule} has no cooldown") if unused else None


def _without_effect(a: Arguments, path: str, rules: tuple[str, ...]) -> tuple[Value, str] | None:
    default, used = settings()[path].default, a.optimizer.optimizer
    return (default, f"optimizer = {used} has none") if used not in rules and get(a, path) != default else None


def _nothing_sharded(a: Arguments, path: str, mode: str) -> tuple[Value, str] | None:
    default, used = settings()[path].default, a.parallel.sharding
    wrong = used == "none" if not mode else used != mode
    return (default, f"sharding = {used} has no use for it") if wrong and get(a, path) != default else None


def _alone(a: Arguments, path: str) -> tuple[Value, str] | None:
    default = settings()[path].default
    return (default, "cp = 1, each rank has whole rows") if a.parallel.cp == 1 and get(a, path) != default else None


def _nproc_of_dp(a: Arguments) -> tuple[Value, str] | None:
    p = a.parallel
    if p.dp is None or (world := p.tp * p.cp * p.pp * p.dp) == a.run.nproc:
        return None
    return world, f"tp*cp*pp*dp = {p.tp}*{p.cp}*{p.pp}*{p.dp}"


def _warmup(a: Arguments) -> tuple[Value, str] | None:
    end = a.optimizer.decay_steps or a.run.steps
    return (end // 10, f"decay_steps // 10 = {end} // 10") if a.optimizer.warmup_steps >= end else None


def _micro_batch(a: Arguments) -> tuple[Value, str] | None:
    p, b = a.parallel, a.batch
    dp = p.dp or (a.run.nproc or 1) // (p.tp * p.cp * p.pp)
    if dp < 1 or b.global_batch % dp or b.global_batch % (b.micro_batch * dp) == 0:
        return None
    share = b.global_batch // dp
    micro = max(size for size in range(1, b.micro_batch + 1) if share % size == 0)
    return micro, f"divides global_batch / dp = {b.global_batch} / {dp}"


def _min_lr(a: Arguments) -> tuple[Value, str] | None:
    o = a.optimizer
    if o.lr_schedule == "constant" or o.min_lr <= o.lr:
        return None
    return float(f"{o.lr / 10:g}"), f"lr / 10 = {o.lr:g} / 10"


_OF_RULES: Final = MappingProxyType(
    {
        "beta1": ("adamw", "lion", "muon"),
        "beta2": ("adamw", "lion", "muon"),
        "eps": ("adamw", "muon"),
        "momentum": ("sgd", "muon"),
    }
)
"""Which update rules read a setting."""

OVERRIDES: tuple[Override, ...] = (
    Override("parallel.sequence_parallel", ("parallel.tp",), _sequence_parallel, ineffective=True),
    Override(
        "parallel.tp_comm_overlap",
        ("parallel.tp", "parallel.sequence_parallel", "run.device"),
        _no_overlap,
        ineffective=True,
    ),
    Override("model.rope_base", ("model.position",), _rope_base, ineffective=True),
    *(
        Override(path, on, partial(_unused, path=path, why=why), ineffective=True)
        for why in UNUSED
        for path, on in why.paths()
    ),
    Override("optimizer.min_lr", ("optimizer.lr_schedule",), _constant_min_lr, ineffective=True),
    Override("optimizer.decay_steps", ("optimizer.lr_schedule",), _constant_decay, ineffective=True),
    Override("optimizer.cooldown_steps", ("optimizer.lr_schedule",), _cooldown_without_wsd, ineffective=True),
    *(
        Override(path, ("run.device",), partial(_nccl, path=path), ineffective=True)
        for path in ("groups.gloo", "nccl.high_priority", "nccl.min_ctas", "nccl.max_ctas")
    ),
    *(
        Override(
            f"optimizer.{name}",
            ("optimizer.optimizer",),
            partial(_without_effect, path=f"optimizer.{name}", rules=rules),
            ineffective=True,
        )
        for name, rules in _OF_RULES.items()
    ),
    *(
        Override(
            f"parallel.{name}",
            ("parallel.sharding",),
            partial(_nothing_sharded, path=f"parallel.{name}", mode=mode),
            ineffective=True,
        )
        for name, mode in (("dp_shard", ""), ("keep_units", "fsdp"))
    ),
    *(
        Override(f"parallel.{name}", ("parallel.cp",), partial(_alone, path=f"parallel.{name}"), ineffective=True)
        for name in ("cp_comm", "cp_a2a")
    ),
    Override("run.nproc", ("parallel.dp",), _nproc_of_dp),
    Override(
        "batch.micro_batch", ("run.nproc", "parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp"), _micro_batch
    ),
    Override("optimizer.warmup_steps", ("run.steps", "optimizer.decay_steps"), _warmup),
    Override("optimizer.min_lr", ("optimizer.lr",), _min_lr),
)


def _nproc(a: Arguments) -> tuple[Value, str] | None:
    p = a.parallel
    dp = p.dp or 1
    return p.tp * p.cp * p.pp * dp, f"tp*cp*pp*dp = {p.tp}*{p.cp}*{p.pp}*{dp}"


def _dp(a: Arguments) -> tuple[Value, str] | None:
    p, world = a.parallel, a.run.nproc or 1
    dp, rest = divmod(world, p.tp * p.cp * p.pp)
    return None if rest else (dp, f"nproc / (tp*cp*pp) = {world} / ({p.tp}*{p.cp}*{p.pp})")


def _vpp(a: Arguments) -> tuple[Value, str] | None:
    return vpp_of(a.parallel), f"schedule = {a.parallel.schedule}"


def _gpus_per_node(a: Arguments) -> tuple[Value, str] | None:
    return (8, "usual") if a.run.device == "cuda" else (a.run.nproc, "nproc: one machine")


def _compile(a: Arguments) -> tuple[Value, str] | None:
    return a.run.device == "cuda", f"device = {a.run.device}"


def _cuda_graphs(a: Arguments) -> tuple[Value, str] | None:
    reason = without_graphs(a)
    return not reason, reason or "every microbatch launches the same"


def _tp_comm_overlap(a: Arguments) -> tuple[Value, str] | None:
    return a.run.device == "cuda" and a.parallel.sequence_parallel, f"device = {a.run.device}, " + (
        "sequence parallel" if a.parallel.sequence_parallel else "not sequence parallel"
    )


def _kv_heads(a: Arguments) -> tuple[Value, str] | None:
    return a.model.num_kv_heads, "heads"


def _head_dim(a: Arguments) -> tuple[Value, str] | None:
    m = a.model
    return None if m.hidden % m.heads else (m.dim_per_head, f"hidden / heads = {m.hidden} / {m.heads}")


def _ffn(a: Arguments) -> tuple[Value, str] | None:
    h = a.model.hidden
    return a.model.dim_ffn, f"8*hidden/3 = 8*{h}/3, up to a multiple of 64" if a.model.gated else f"4*hidden = 4*{h}"


def _expert_ffn(a: Arguments) -> tuple[Value, str] | None:
    return (a.model.dim_ffn, "ffn") if a.model.experts else None


def _vocab(a: Arguments) -> tuple[Value, str] | None:
    name = a.data.tokenizer
    return (TOKENIZERS[name], f"that of the tokenizer {name}") if name in TOKENIZERS else None


def _decay_steps(a: Arguments) -> tuple[Value, str] | None:
    return a.run.steps, "steps"


def _cooldown_steps(a: Arguments) -> tuple[Value, str] | None:
    o, end = a.optimizer, a.optimizer.decay_steps or a.run.steps
    if o.lr_schedule != "wsd":
        return None
    return max(1, (end - o.warmup_steps) // 5), f"(decay_steps - warmup_steps) // 5 = ({end} - {o.warmup_steps}) // 5"


_SIZES = ("parallel.tp", "parallel.cp", "parallel.pp")

DERIVATIONS: tuple[Derivation, ...] = (
    Derivation("run.nproc", (*_SIZES, "parallel.dp"), "tp*cp*pp*dp, with dp = 1 unless set", _nproc),
    Derivation("parallel.dp", (*_SIZES, "run.nproc"), "nproc / (tp*cp*pp)", _dp),
    Derivation("parallel.vpp", ("parallel.schedule",), "what the schedule has: 1 or 2", _vpp),
    Derivation("parallel.gpus_per_node", ("run.device", "run.nproc"), "8 (cuda), nproc (cpu)", _gpus_per_node),
    Derivation("run.compile", ("run.device",), "true (cuda), false (cpu)", _compile),
    Derivation(
        "parallel.tp_comm_overlap",
        ("run.device", "parallel.sequence_parallel"),
        "true (cuda, sequence parallel), else false",
        _tp_comm_overlap,
    ),
    Derivation("run.cuda_graphs", READS, "true where they can be recorded (cuda), else false", _cuda_graphs),
    Derivation("model.kv_heads", ("model.heads",), "heads", _kv_heads),
    Derivation("model.head_dim", ("model.hidden", "model.heads"), "hidden / heads", _head_dim),
    Derivation(
        "model.ffn",
        ("model.hidden", "model.activation"),
        "4*hidden, 8*hidden/3 up to a multiple of 64 (gated: swiglu, geglu, geglu-tanh)",
        _ffn,
    ),
    Derivation("model.expert_ffn", ("model.ffn", "model.experts"), "ffn (with experts)", _expert_ffn),
    Derivation("model.vocab", ("data.tokenizer",), "the tokenizer's", _vocab),
    Derivation("optimizer.decay_steps", ("run.steps",), "steps", _decay_steps),
    Derivation(
        "optimizer.cooldown_steps",
        ("optimizer.decay_steps", "optimizer.warmup_steps", "optimizer.lr_schedule"),
        "(decay_steps - warmup_steps) // 5 for wsd",
        _cooldown_steps,
    ),
)
