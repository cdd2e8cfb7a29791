"""Values that follow from others: derived where nothing was said, or given way to something stronger.

Both tables are read in order, by `validate.py`. Each entry states its equation with the numbers, which
becomes the source of the value.
"""

from __future__ import annotations

from stretto.arguments.compute_rules import graphs_can_be_recorded, without_graphs
from stretto.arguments.rule import Expression, fields_of, told
from stretto.arguments.schema import Arguments
from stretto.arguments.sections import TOKENIZERS
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, paths, settings
from stretto.arguments.unused import UNUSED, Derivation, Equation


def _nproc_of_dp(a: Arguments) -> tuple[Value, str] | None:
    return None if a.parallel.dp is None or (found := _nproc(a))[0] == a.run.nproc else found


def _stage_layers(a: Arguments) -> tuple[Value, str] | None:
    p = a.parallel
    if p.stage_layers is None or len(p.stage_layers) == p.num_stages:
        return None
    return None, f"those set are of {len(p.stage_layers)} stages, pp*vpp = {p.pp}*{p.stages_per_rank}"


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
    return float(f"{o.lr / 10:g}"), told("{lr / 10}", a)


OVERRIDES: tuple[Derivation, ...] = (
    *UNUSED,
    Derivation("run.nproc", fields_of("dp"), _nproc_of_dp),
    Derivation("batch.micro_batch", fields_of("nproc", "tp", "cp", "pp", "dp"), _micro_batch),
    Derivation("parallel.stage_layers", fields_of("pp", "vpp", "schedule"), _stage_layers),
    Derivation("optimizer.warmup_steps", fields_of("steps", "decay_steps"), _warmup),
    Derivation("optimizer.min_lr", fields_of("lr"), _min_lr),
)


def _equal(name: str, equation: str, where: str = "True", meaning: str = "") -> Derivation:
    """The value of an expression over settings, where that is a whole number and another expression holds."""
    value, holds = Expression(equation), Expression(where)

    def number(a: Arguments) -> tuple[Value, str] | None:
        if None in (get(a, path) for path in value.fields) or not holds(a) or value(a) % 1:
            return None
        return int(value(a)), equation if equation in paths() else told(f"{{{equation}}}", a)

    return Derivation(paths()[name], (*value.fields, *holds.fields), number, meaning or equation)


def _holds(name: str, condition: str, meaning: str) -> Derivation:
    """Whether an expression holds, with the settings that it reads."""
    holds = Expression(condition)
    said = ", ".join(f"{{{settings()[path].name}}}" for path in holds.fields)
    return Derivation(paths()[name], holds.fields, lambda a: (bool(holds(a)), told(said, a)), meaning)


def _derived(name: str, inputs: str, meaning: str, equation: Equation) -> Derivation:
    return Derivation(paths()[name], fields_of(*inputs.split()), equation, meaning)


def _nproc(a: Arguments) -> tuple[Value, str]:
    p, dp = a.parallel, a.parallel.dp or 1
    return p.tp * p.cp * p.pp * dp, f"tp*cp*pp*dp = {p.tp}*{p.cp}*{p.pp}*{dp}"


def _vpp(a: Arguments) -> tuple[Value, str]:
    return a.parallel.stages_per_rank, told("{schedule}", a)


def _vpp_shape(a: Arguments) -> tuple[Value, str]:
    return a.parallel.shape, told("{schedule}, {vpp}", a)


def _gpus_per_node(a: Arguments) -> tuple[Value, str]:
    return (8, "usual") if a.run.device == "cuda" else (a.run.nproc, "nproc: one machine")


def _sharding(a: Arguments) -> tuple[Value, str]:
    return "zero1" if a.run.device == "cuda" else "none", told("{device}", a)


def _cuda_graphs(a: Arguments) -> tuple[Value, str]:
    reason = without_graphs(a)
    return not reason, reason or "every microbatch launches the same"


def _ffn(a: Arguments) -> tuple[Value, str]:
    return a.model.dim_ffn, told("{8*hidden/3}, up to a multiple of 64" if a.model.gated else "{4*hidden}", a)


def _vocab(a: Arguments) -> tuple[Value, str] | None:
    name = a.data.tokenizer
    return (TOKENIZERS[name], f"that of the tokenizer {name}") if name in TOKENIZERS else None


def _cooldown_steps(a: Arguments) -> tuple[Value, str] | None:
    o, end = a.optimizer, a.optimizer.decay_steps or a.run.steps
    equation = f"(decay_steps - warmup_steps) // 5 = ({end} - {o.warmup_steps}) // 5"
    return (max(1, (end - o.warmup_steps) // 5), equation) if o.lr_schedule == "wsd" else None


_GATED = "4*hidden, 8*hidden/3 up to a multiple of 64 (gated: swiglu, geglu, geglu-tanh)"
_WSD = "(decay_steps - warmup_steps) // 5 for wsd"

DERIVATIONS: tuple[Derivation, ...] = (
    _derived("nproc", "tp cp pp dp", "tp*cp*pp*dp, with dp = 1 unless set", _nproc),
    _equal("dp", "nproc / (tp*cp*pp)"),
    _derived("vpp", "schedule", "what the schedule has: 1 or 2", _vpp),
    _derived("vpp_shape", "schedule vpp", "what the schedule has: loop or v", _vpp_shape),
    _derived("gpus_per_node", "device nproc", "8 (cuda), nproc (cpu)", _gpus_per_node),
    _derived("sharding", "device", "zero1 (cuda), else none", _sharding),
    _holds("compile", "device == 'cuda' and exact is None", "true (cuda, without exact), else false"),
    _holds("tp_comm_overlap", "device == 'cuda' and sequence_parallel", "true (cuda, sequence parallel), else false"),
    _equal("kv_heads", "heads"),
    _equal("head_dim", "hidden / heads"),
    _equal("rope_head_dim", "head_dim // 2", "kv_lora_rank and head_dim > 3"),
    _equal("v_head_dim", "head_dim - rope_head_dim", "kv_lora_rank and head_dim > rope_head_dim"),
    _derived("ffn", "hidden activation", _GATED, _ffn),
    _equal("expert_ffn", "ffn", "experts", "ffn (with experts)"),
    Derivation(
        "run.cuda_graphs",
        graphs_can_be_recorded.fields,
        _cuda_graphs,
        "true where they can be recorded (cuda), else false",
    ),
    _derived("vocab", "tokenizer", "the tokenizer's", _vocab),
    _equal("decay_steps", "steps", "lr_schedule != 'constant'", "steps, unless the rate is constant"),
    _derived("cooldown_steps", "decay_steps warmup_steps lr_schedule", _WSD, _cooldown_steps),
)
