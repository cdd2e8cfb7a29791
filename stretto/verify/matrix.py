"""Which features are proven to leave the model as it is, in company with which.

A combination is what a run uses, not how much of it: whether tensors are cut, whether the sequence is and how its ranks
communicate, which schedule runs the pipeline, how data parallelism is sharded, where experts lie, whether a row has
several documents, what is trained, whether activations are dropped or computed again, in which dtype.
Every two of these stand together in a row of `docs/verified.md`, which has the errors measured; a run that uses a
setting that no row has is told so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import product

from stretto.arguments.errors import as_text
from stretto.arguments.recomputation import USUAL
from stretto.arguments.schema import (
    Arguments,
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TuningConfig,
)
from stretto.estimate.context import comm_of
from stretto.layout.schedules import FAMILIES
from stretto.schedule.sharding import MODES
from stretto.verify.compare import ROUNDING, Comparison

TENSOR = ("-", "tp", "tp + sequence parallel")
CONTEXT = ("-", "cp all-gather", "cp needed", "cp ring", "cp ulysses")
IN_HALVES = ", in halves"
EXPERTS = ("-", "experts", "ep", "etp", "ep + etp", "ep" + IN_HALVES)
DOCUMENTS = ("-", "packing")
TRAINED = ("-", "adapters", "frozen parameters")
PIPELINE = ("-", *FAMILIES)
DATA = ("-", "dp", *(mode for mode in MODES if mode != "none"))
RECOMPUTE = {"none": "", "selective": "selective recomputation", "block": "recomputation of blocks"}
ACTIVATIONS = tuple(" + ".join(filter(None, each)) or "-" for each in product(("", "dropout"), RECOMPUTE.values()))
APART = {("ep" + IN_HALVES, each) for each in ACTIVATIONS if each.endswith(RECOMPUTE["block"])}
"""Features of two kinds that a rule rejects together."""
FEATURES = (TENSOR, CONTEXT, PIPELINE, DATA, EXPERTS, DOCUMENTS, TRAINED, ACTIVATIONS)
DTYPES = ("fp64", "fp32", "bf16")

MOST = 8
"""Ranks of an example."""

PAGE = "docs/verified.md"

# What a combination says in words of its own, and what none tells apart: sizes, and where ranks lie.
_SPOKEN_FOR = (
    *("tp", "sequence_parallel", "tp_comm_overlap", "cp", "cp_comm", "pp", "vpp", "schedule", "dp", "ep", "etp"),
    *("ep_comm_overlap", "stage_layers", "bucket_mb", "order", "gpus_per_node", "sharding", "keep_units"),
    *("schedule_costs", "schedule_memory", "vpp_shape", "partition", "pp_copy_engines"),
    *("dp_copy_engines", "ep_copy_engines"),
)


@dataclass(frozen=True)
class Combination:
    """The features that a run uses together."""

    tensor: str
    context: str
    pipeline: str
    data: str
    experts: str
    documents: str
    trained: str
    activations: str
    dtype: str
    other: tuple[str, ...] = ()
    """Settings that no row of the page has, where they are not at their default."""

    def __str__(self) -> str:
        used = [part for part in (self.tensor, self.context, self.pipeline, self.data, self.experts) if part != "-"]
        with_them = [part for part in (self.documents, self.trained, self.activations) if part != "-"]
        return ", ".join([" x ".join(used) or "one process", *with_them, *self.other, self.dtype])


def combination(args: Arguments) -> Combination:
    """What resolved arguments use. A setting that is new to the layout counts until it is spoken for."""
    p, r = args.parallel, args.run
    tensor = TENSOR[1 + p.sequence_parallel] if p.tp > 1 else "-"
    recompute = RECOMPUTE.get(r.recompute, "")
    activations = " + ".join(filter(None, ("dropout" if args.model.dropout else "", recompute))) or "-"
    other = tuple(
        f"{f.name}={as_text(getattr(p, f.name))}"
        for f in fields(ParallelConfig)
        if f.name not in _SPOKEN_FOR and getattr(p, f.name) != f.default
    )
    if r.recompute not in RECOMPUTE:
        other += (f"recompute={r.recompute}",)
    if r.recompute_parts != USUAL:
        other += (f"recompute_parts={','.join(r.recompute_parts)}",)
    if r.activation_budget is not None:
        other += ("activation_budget",)
    if args.optimizer.post_validate:
        other += ("post_validate",)
    if args.optimizer.masters != "fp32":
        other += (f"masters={args.optimizer.masters}",)
    if args.model.mtp_layers:
        other += (f"mtp_layers={args.model.mtp_layers}",)
    if r.ffn_chunks > 1:
        other += (f"ffn_chunks={r.ffn_chunks}",)
    if r.fp8 != "none":
        other += (f"fp8={r.fp8}",)
    ways = tuple(dict.fromkeys(comm_of(args, layer) for layer in range(args.model.layers))) if p.cp > 1 else ()
    context = f"cp {ways[0]}" if ways and f"cp {ways[0]}" in CONTEXT else "-"
    if len(ways) > 1 or (ways and context == "-"):
        other += (f"cp={p.cp}", f"cp_comm={','.join(ways)}")
    spread = " + ".join(name for name in ("ep", "etp") if getattr(p, name) > 1)
    experts = (spread or "experts") if args.model.experts else "-"
    if p.ep_comm_overlap and experts + IN_HALVES in EXPERTS:
        experts += IN_HALVES
    elif p.ep_comm_overlap:
        other += ("ep_comm_overlap=true",)
    trained = "adapters" if args.tuning.lora_rank else "frozen parameters" if args.tuning.freeze else "-"
    pipeline, replicas = p.schedule if p.pp > 1 else "-", "dp" if p.mode == "none" else p.mode
    data = replicas if (p.dp or 1) > 1 else "-"
    documents = DOCUMENTS[args.data.packing]
    return Combination(tensor, context, pipeline, data, experts, documents, trained, activations, r.dtype, other)


def sizes(of: Combination) -> dict[str, int]:
    """Ranks along each axis in its example."""
    spread = of.experts.removesuffix(IN_HALVES).split(" + ")
    sizes = {"tp": of.tensor != "-", "cp": of.context != "-", "pp": of.pipeline != "-", "dp": of.data != "-"}
    found = {axis: 1 + there for axis, there in sizes.items()}
    return found | {axis: 1 + (axis in spread) for axis in ("ep", "etp")}


def exists(of: Combination) -> bool:
    """Whether its example has ranks for its experts to lie on, and at most so many in all; and no rule rejects it."""
    if (of.experts, of.activations) in APART:
        return False
    n = sizes(of)
    stage = n["tp"] * n["cp"] * n["dp"]
    return stage * n["pp"] <= MOST and stage % (n["ep"] * n["etp"]) == 0


def used_up(found: Comparison) -> float:
    """How much of what is allowed the worst error takes up: more than 1 is wrong, as is a replica that differs."""
    return math.inf if found.unequal else max(d.severity for d in found.differences)


def untested(args: Arguments) -> str | None:
    """A line that warns of a combination that nobody has verified."""
    used = combination(args)
    if not used.other:
        return None
    return f"not among the verified combinations: {used}; `stretto verify` with the same words compares it"


def example(of: Combination, *, options: bool) -> Arguments:
    """A small run of the combination, with every option of the model on, or with none.

    Where rounding is coarse it is wider: that of a few numbers does not average out.
    """
    width = 4 if of.dtype in ROUNDING else 1
    schedule = "1f1b" if of.pipeline == "-" else of.pipeline
    stages = 2 * FAMILIES[schedule].stages  # on two ranks
    n = sizes(of)
    pp, dp = n["pp"], n["dp"]
    # Where rounding is coarse every token goes to all experts: the nearest two of them would change places.
    experts = {"experts": 4, "top_k": 4 if of.dtype in ROUNDING else 2, "expert_ffn": 16 * width, "balance_loss": 0.01}
    model = ModelConfig(
        layers=1 + stages,
        hidden=16 * width,
        heads=4,
        kv_heads=1 if options else 4,  # one for two tensor-parallel ranks: both hold a copy
        head_dim=4 * width,
        ffn=24 * width,
        vocab=53,
        norm="layer" if options else "rms",
        position="learned" if options else "rope",
        activation="gelu" if options else "swiglu",
        bias=options,
        tied=options,
        qk_norm=options,
        dropout=0.2 if "dropout" in of.activations else 0.0,
        **(experts if of.experts != "-" else {}),  # type: ignore[arg-type]
    )
    comm = () if of.context == "-" else (of.context.removeprefix("cp "),)
    parallel = ParallelConfig(
        **n,  # type: ignore[arg-type]
        cp_comm=comm or ("auto",),  # type: ignore[arg-type]
        sequence_parallel=of.tensor == TENSOR[2],
        schedule=schedule,  # type: ignore[arg-type]
        # Blocks that are cut between attention and feed-forward, and an empty stage.
        stage_layers=((2.5, 0.5) if stages == 2 else (1.5, 0, 2, 1.5)) if options and pp == 2 else None,
        bucket_mb=0.005,
        sharding=of.data if of.data in DATA[2:] else "none",  # type: ignore[arg-type]
        ep_comm_overlap=of.experts.endswith(IN_HALVES),
    )
    batch = BatchConfig(seq_len=8, micro_batch=1 + parallel.ep_comm_overlap, global_batch=4 * dp)
    recompute = next(how for how, words in reversed(RECOMPUTE.items()) if words in of.activations)
    return Arguments(
        model=model,
        parallel=parallel,
        batch=batch,
        data=DataConfig(packing=of.documents == "packing"),
        tuning=TuningConfig(
            lora_rank=2 * (of.trained == "adapters"), freeze=("*.mlp.*",) if of.trained == TRAINED[2] else ()
        ),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.5),
        loss=LossConfig(label_smoothing=0.1, z_loss=1e-2) if options else LossConfig(),
        run=RunConfig(dtype=of.dtype, timeout=120.0, recompute=recompute),  # type: ignore[arg-type]
    )
