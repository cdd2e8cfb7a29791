"""How long a step takes, from its arguments alone: operations and bytes at a chip's rates, the schedule simulated.

Rates of Hopper GPUs in bf16 and FP8 are in `chips`; `docs/planning.md` has estimates beside measured steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stretto.arguments.schema import Arguments
from stretto.estimate.chips import Chip
from stretto.estimate.context import Kind, kind_of
from stretto.estimate.kept import GEMM, Parts
from stretto.estimate.kept import seconds as again
from stretto.estimate.memo import Memo
from stretto.estimate.memory import held_by
from stretto.estimate.parameters import count_parameters
from stretto.estimate.passes import Passes, StepTime, summed
from stretto.estimate.recompute import policy_of, policy_of_further
from stretto.estimate.sizes import BYTES, entering_bytes, local_tokens
from stretto.estimate.stages import stage_blocks, stage_counts
from stretto.estimate.sublayer_time import attention, feed_forward, product, rate_between
from stretto.layout.stages import placement
from stretto.schedule import Cost, schedule_for, simulate
from stretto.schedule.blocks import StageBlock
from stretto.schedule.sharding import MODES
from stretto.schedule.simulate import makespan

_STATE = 4 + 4 * 4 + 3 * 4 + 2
"""Bytes that an update moves for a parameter: gradient for the norm; gradient, master and moments in, and out again."""


_PLAYED = 3
"""Microbatches of each rank that are simulated, at most."""


def step_time(args: Arguments, chip: Chip, memo: Memo | None = None) -> StepTime:
    """Estimate a step on GPUs in bf16 or FP8. Muon's GEMMs are not counted, nor are evaluations and saves.

    A planner has a `memo` for what many of its runs share.
    """
    return _whole(args, chip, memo or Memo(), simulated=True)


def least_step_time(args: Arguments, chip: Chip, memo: Memo | None = None) -> float:
    """Seconds that the same step takes at least: without its bubble, which takes a simulation to know."""
    # The same sum in another order is no bound.
    return _whole(args, chip, memo or Memo(), simulated=False).total * (1 - 1e-12)


def _whole(args: Arguments, chip: Chip, memo: Memo, *, simulated: bool) -> StepTime:
    p, m = args.parallel, args.batch.microbatches(args.parallel.dp)
    spent, held = memo(_computed, replace(args, parallel=replace(p, sharding="none")), chip, simulated, memo)
    spent += _sharding(args, chip, held, spent.total / m, memo)
    layers, blocks = sum(stage_counts(args)[s] for s in held), args.model.layers
    each = chip.host + (chip.host_sparse - chip.host) * len(args.model.sparse_layers) / blocks
    host = 0.0 if args.run.cuda_graphs else each * layers * m
    return spent + StepTime(launches=max(chip.gaps, host - spent.total))


def _computed(args: Arguments, chip: Chip, simulated: bool, memo: Memo) -> tuple[StepTime, list[int]]:
    """A step without what follows from sharding, and the stages of the rank that computes longest. A planner asks for
    the same one with each way to shard."""
    p, m = args.parallel, args.batch.microbatches(args.parallel.dp)
    stages, homes = _stages(args, chip, memo), placement(p.pp, p.stages_per_rank, p.shape)
    loads = [0.0] * p.pp
    for s, rank in enumerate(homes):
        loads[rank] += stages[s].total.total
    busiest = max(range(p.pp), key=loads.__getitem__)
    held = [s for s, r in enumerate(homes) if r == busiest]
    # A bubble is that of the ends of a step: between them its ranks are in step, however many microbatches there are.
    played = min(m, _PLAYED * p.pp)
    spent = sum((stages[s].total.times(played) for s in held), StepTime())
    if simulated and p.pp > 1:
        spent += StepTime(bubble=_makespan(args, chip, stages, played, memo) - spent.total)
    spent += sum((stages[s].total.times(m - played) for s in held), StepTime())
    return spent, held


def _makespan(args: Arguments, chip: Chip, stages: Sequence[Passes], microbatches: int, memo: Memo) -> float:
    p = args.parallel
    cost = Cost.split(
        tuple(s.forward.total for s in stages),
        tuple(s.inputs.total for s in stages),
        tuple(s.weights.total for s in stages),
        hop=chip.latency,
        transfer=entering_bytes(args) / rate_between(args, chip, p.tp * p.cp * (p.dp or 1) * p.pp),
    )
    return makespan(simulate(memo(schedule_for, p.schedule, p.pp, microbatches, p.stages_per_rank), cost))


def _stages(args: Arguments, chip: Chip, memo: Memo) -> list[Passes]:
    """Each stage; of those that are alike one is computed, and of all their layers one of each kind."""
    layers: dict[tuple[Kind, Parts], Passes] = {}
    found: dict[tuple[object, ...], Passes] = {}
    stages = []
    for stage, held in enumerate(all_held := stage_blocks(args)):
        last = stage == len(all_held) - 1
        kinds = _kinds(args, held, policy_of(args, stage, memo))
        for kind, layer in kinds.items():
            if kind not in layers:
                layers[kind] = _block(args, chip, layer[0], kind[1])
        alike = (last, *((kind, len(layer)) for kind, layer in kinds.items()))
        if alike not in found:
            of_layers = [layers[kind].times(len(layer)) for kind, layer in kinds.items()]
            found[alike] = summed([*of_layers, *(_further(args, chip) if last else ())])
        stages.append(found[alike])
    return stages


def _kinds(
    args: Arguments, held: Sequence[StageBlock], policy: Sequence[Parts]
) -> dict[tuple[Kind, Parts], list[StageBlock]]:
    """Blocks of a stage, by what their time follows from."""
    found = dict[tuple[Kind, Parts], list[StageBlock]]()
    for block, parts in zip(held, policy, strict=True):
        found.setdefault((kind_of(args, block), parts), []).append(block)
    return found


def _further(args: Arguments, chip: Chip) -> Iterator[Passes]:
    """Behind the last layer: the head, and what predicts further tokens."""
    yield _head(args, chip).times(1 + args.model.mtp_layers)
    for layer, parts in policy_of_further(args).items():
        yield from (_block(args, chip, StageBlock(layer), parts), _join(args, chip))


def _block(args: Arguments, chip: Chip, block: StageBlock, parts: frozenset[str]) -> Passes:
    """A block, as far as it is on a stage."""
    here = (block.attention, attention), (block.feed_forward, feed_forward)
    each = [sublayer(args, chip, block.layer) for held, sublayer in here if held]
    recomputed = StepTime(recomputation=again(args, block, parts) * GEMM / chip.gemm)
    return summed([*each, Passes(StepTime(), recomputed, StepTime())])


def _head(args: Arguments, chip: Chip) -> Passes:
    """The last norm, the head and the loss, which make their gradients at once."""
    tokens, vocab = local_tokens(args), args.model.vocab_size / args.parallel.tp
    products = 3 * product(args, chip, tokens, vocab, args.model.hidden)
    moved = (3 * vocab + 8 * args.model.hidden) * tokens * BYTES[args.run.dtype] * chip.pass_over
    return Passes(StepTime(products, elementwise=moved / chip.memory), StepTime(), StepTime())


def _join(args: Arguments, chip: Chip) -> Passes:
    """What leads into a layer that predicts a further token: each tensor-parallel rank multiplies by all of it."""
    p, h = args.parallel, args.model.hidden
    one = product(args, chip, local_tokens(args) / (p.tp if p.sequence_parallel else 1), h, 2 * h)
    return Passes(StepTime(one), StepTime(one), StepTime(one))


def _sharding(args: Arguments, chip: Chip, stages: list[int], microbatch: float, memo: Memo) -> StepTime:
    """The update, and the communication of weights and gradients over dp; `microbatch`: seconds to hide behind."""
    p, m = args.parallel, args.batch.microbatches(args.parallel.dp)
    dp, mode = p.dp or 1, MODES[p.mode]
    reductions = m if mode.reduce_each else 1
    dense, routed = _parameters(args, stages)
    edp = max(1, p.tp * p.cp * dp // (p.ep * p.etp))
    update = sent = 0.0
    item, wire = BYTES[args.run.dtype], 2 if p.reduce_dtype == "bf16" else 4
    in_fp8 = (dense - _ends(args, stages)) * (args.run.fp8 == "tensorwise")
    for count, ranks, quantized in ((dense, dp * p.cp, in_fp8), (routed, edp, 0.0)):
        shard = ranks if mode.state else 1
        update += count / shard * _STATE * chip.update_over / chip.memory
        across = count * (ranks - 1) / ranks / rate_between(args, chip, p.tp * ranks)
        reduced = reductions * (wire if mode.state else 2 * wire)  # an all-reduce sends all of it twice
        gathered = item if mode.state else 0.0
        if mode.params and count:
            gathered = 2 * m * (item - (item - 1) * quantized / count)
        sent += across * (reduced + gathered)
    behind = microbatch * (0.9 * m if mode.reduce_each else 0.6)
    if args.optimizer.optimizer_cpu_offload:  # beside the next forward alone, which needs what is updated
        rank = placement(p.pp, p.stages_per_rank, p.shape)[stages[0]]
        update = max(update, held_by(args, rank, memo).total("host") / chip.to_host - microbatch / 3)
    return StepTime(optimizer=update, communication=max(chip.contention * sent, sent - behind))


def _parameters(args: Arguments, stages: list[int]) -> tuple[float, float]:
    """Of a rank's stages: parameters that all tokens go through, and of its routed experts."""
    p, count = args.parallel, count_parameters(args.model, args.batch.seq_len)
    blocks, is_sparse = [block for stage in stages for block in stage_blocks(args)[stage]], args.model.is_sparse
    sparse = sum(block.feed_forward and is_sparse(block.layer) for block in blocks)
    last = len(stage_blocks(args)) - 1 in stages
    routed = (sparse + count.further_sparse * last) * args.model.experts * count.expert
    dense = count.held(blocks, is_sparse) + count.further * last - routed
    return dense / p.tp + _ends(args, stages), routed / (p.ep * p.etp)


def _ends(args: Arguments, stages: list[int]) -> float:
    """Parameters of embedding and head among them."""
    count = count_parameters(args.model, args.batch.seq_len)
    first, last = 0 in stages, len(stage_blocks(args)) - 1 in stages
    return (count.embedding * (first or (last and args.model.shared_embedding)) + count.head * last) / args.parallel.tp
