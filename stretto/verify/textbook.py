"""What a training step should send, from the sizes of the model and of the layout alone.

The counts are those of the papers: Shoeybi et al., "Megatron-LM" (2019) and Korthikanti et al., "Reducing activation
recomputation" (2022) for tensor and sequence parallelism, Narayanan et al. (2021) for pipelines, Patarasuk and Yuan
(2009) for the bytes of a ring: of n ranks each sends 2(n-1)/n of an all-reduce's tensor, (n-1)/n of the whole tensor
of an all-gather or reduce-scatter.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stretto.arguments.schema import Arguments
from stretto.estimate.context import comm_of, every_comm
from stretto.estimate.sizes import local_tokens
from stretto.layout import Layout
from stretto.models import StageSpec, Transformer
from stretto.params import Declared, Logical, collect
from stretto.sequence import crossing, needed
from stretto.tensor_parallel import Build
from stretto.train.dtypes import DTYPES
from stretto.train.stages import stage_specs, structure_of_rows
from stretto.verify.textbook_blocks import recomputed, sides
from stretto.verify.textbook_experts import Exchanged, balance, blocks_of, expert_axes_at, require_counted
from stretto.world import Axis, ExpertAxes

Bytes = dict[tuple[str, str], float]
"""By axis and operation."""

FLAT = ("dp-cp", "dp:gather-cp", "edp", "edp:gather")
"""Axes over which flat storage travels."""

ALIGNED = 64
"""Elements: buckets may begin every parameter at a multiple of so many."""


def expected(args: Arguments, layout: Layout, rank: int) -> Bytes:
    """Bytes that `rank` sends in one optimizer step, by axis and operation; what is 0 is left out.

    Raises NotImplementedError for gathers that come and go, and see `require_counted`.
    """
    require_counted(args, layout)
    if args.data.packing and args.parallel.cp > 1 and "needed" in every_comm(args):
        raise NotImplementedError("no textbook volumes for keys that documents decide")
    if args.parallel.mode == "fsdp" or "dp.0" in layout.axes:
        raise NotImplementedError("no textbook volumes for weights that are gathered block by block yet")
    at, step = layout.coords(rank), _Step(args, layout)
    stages, every = layout.stages(rank), stage_specs(args)
    found: Bytes = {}
    terms = [
        term
        for stage in stages
        for part in (every[stage],)
        for term in (
            step.borders(part),
            step.context(part, at["cp"]),
            step.scales(part),
            step.squares(part),
            step.loss(part),
            step.messages(stage),
            Exchanged(args, layout).sent(part),
        )
    ]
    for term in (*terms, step.gradients([every[stage] for stage in stages], at)):
        for key, size in term.items():
            found[key] = found.get(key, 0.0) + size
    # The count of tokens; the gradient's norm; the loss and the votes to stop.
    dense = not args.model.experts and (args.parallel.mode == "none" or layout.size("dp", "cp") == 1)
    norm = "tp-pp" if dense else "tp-cp-dp-pp"
    for axis, size in (
        ("dp-cp", 8.0),
        (norm, 8.0),
        ("tp-cp-dp-pp", 16.0 + 16.0 * args.model.mtp_layers + balance(args)),
    ):
        key = axis, "all_reduce"
        found[key] = found.get(key, 0.0) + step.all_reduce(axis, size)
    return {key: size for key, size in found.items() if size}


def needed_rows(args: Arguments, rank: int, window: int | None) -> tuple[int, int]:
    """Keys of a row of one document that a rank of cp sends to those that need them, and those that it needs."""
    (held,) = structure_of_rows(args).held
    pairs = crossing(needed(held.runs, window))
    return int(pairs[rank].sum()), int(pairs[:, rank].sum())


@dataclass(frozen=True)
class _Step:
    args: Arguments
    layout: Layout

    @property
    def microbatches(self) -> int:
        return self.args.batch.microbatches(self.layout.size("dp"))

    @property
    def activation(self) -> int:
        """Bytes of a whole [s, b, h]."""
        return self.tokens * self.args.model.hidden * DTYPES[self.args.run.dtype].itemsize

    @property
    def tokens(self) -> int:
        """Of one microbatch on a rank of cp."""
        return local_tokens(self.args)

    @property
    def wide(self) -> int:
        """Bytes of a number in the loss and in gradients, fp32 or wider."""
        return max(4, DTYPES[self.args.run.dtype].itemsize)

    def borders(self, part: StageSpec) -> Bytes:
        """Every layer enters and leaves two parallel regions, one in each sublayer; the embedding leaves one, the head
        enters one. Attention with latents enters with these, and with the residual stream where queries have none;
        experts have no region of their own, those that every token goes through do. A further token is one more use of
        embedding and head.

        Each border costs one all-reduce in one of the two directions, or under sequence parallelism an all-gather in
        one and a reduce-scatter in the other. What is recomputed crosses its borders once more."""
        mb, one, every = self.microbatches, self.all_reduce("tp", self.activation), recomputed(self.args, part)
        every_side = [sides(self.args.model, block) for block in blocks_of(self.args.model, part)]
        ends = part.first + part.last * (1 + 2 * self.args.model.mtp_layers)
        both = sum(entered + left for entered, left in every_side) + ends
        again, left_again = sum(each.entered for each in every), sum(each.left for each in every)
        if self.args.parallel.sequence_parallel:
            gathers, scatters = (both + again) / 2, (both + left_again) / 2
            return {("tp", "all_gather"): gathers * mb * one, ("tp", "reduce_scatter"): scatters * mb * one}
        return {("tp", "all_reduce"): (both + left_again) * mb * one}

    def context(self, part: StageSpec, rank: int) -> Bytes:
        """Of each layer keys and values, and their gradients in fp32 or wider; or all heads, and their gradients.

        A ring takes one step less for keys than it has ranks, forward and once more in the backward, and as many as it
        has for gradients, which end at home. What is needed is sent to each rank that needs it, and the gradient of
        what came goes back. A recomputed block has its forward once more.
        """
        if self.layout.size("cp") == 1:
            return {}
        m, p, found = self.args.model, self.args.parallel, defaultdict[tuple[str, str], float](float)
        item = DTYPES[self.args.run.dtype].itemsize
        head, kv_heads = self.tokens * m.dim_per_head * self.microbatches, max(1, m.num_kv_heads // p.tp)
        for block, each in zip(blocks_of(self.args.model, part), recomputed(self.args, part), strict=True):
            if not block.attention:
                continue
            forwards = 1 + each.attention
            comm = comm_of(self.args, block.layer)
            inner = p.cp if comm == "ulysses" else (p.cp_a2a or 1) if comm == "hybrid" else 1
            outer, copies = p.cp // inner, inner // math.gcd(kv_heads, inner)
            two = inner > 1 and outer > 1
            heads = head * item * (2 * m.heads // p.tp + 2 * kv_heads * copies)
            found["cp.0" if two else "cp", "all_to_all"] += heads * (forwards + 1) * (inner - 1) / inner
            keys, axis = head * 2 * kv_heads * copies, "cp.1" if two else "cp"
            if comm in ("ring", "hybrid"):
                found[axis, "shift"] += keys * ((outer - 1) * item * (forwards + 1) + outer * self.wide)
            elif comm == "needed":
                sent, came = needed_rows(self.args, rank, m.window_of(block.layer))
                found[axis, "all_to_all_rows"] += (
                    keys / self.tokens * self.args.batch.micro_batch * (sent * item * (forwards + 1) + came * self.wide)
                )
            else:
                found[axis, "all_gather"] += keys * item * (forwards + 1) * (outer - 1)
                found[axis, "reduce_scatter"] += keys * self.wide * (outer - 1)
        return dict(found)

    def scales(self, part: StageSpec) -> Bytes:
        """Of what tp cuts, the ranks agree on the scales of FP8, by their maximum, in fp32.

        Once in a step for each of a sublayer's two matrices, and for each microbatch for one input and for one
        gradient of an output; for the inputs once more where the block is computed again. Rowwise there is a scale for
        each token, and one of each matrix for each of its rows or columns that is not cut: the hidden size.
        """
        if self.args.run.fp8 == "none":
            return {}
        rowwise = self.args.run.fp8 == "rowwise"
        weights = 2 * (self.args.model.hidden if rowwise else 1)
        scales = self.microbatches * (self.tokens if rowwise else 1)
        sublayers = [block.attention + block.feed_forward for block in blocks_of(self.args.model, part)]
        every = [
            self.all_reduce("tp", 4 * (n * weights + (2 * n + each.left) * scales))
            for n, each in zip(sublayers, recomputed(self.args, part), strict=True)
        ]
        return {("tp", "all_reduce_max"): sum(every)}

    def squares(self, part: StageSpec) -> Bytes:
        """Norms over all heads: of each token two mean squares, and their gradients; once more where recomputed."""
        model = self.args.model
        if not model.qk_norm or model.qk_norm_width == "head":
            return {}
        attention = 2 * sum(block.attention for block in blocks_of(model, part))
        times = (attention + sum(each.heads for each in recomputed(self.args, part))) * self.microbatches
        return {("tp", "all_reduce"): times * self.all_reduce("tp", 2 * self.tokens * self.wide)}

    def loss(self, part: StageSpec) -> Bytes:
        """Of each token the maximum of the logits, the sum of exponentials, and the label's logit; smoothed, a sum."""
        times = self.microbatches * part.last * (1 + self.args.model.mtp_layers)
        one = self.all_reduce("tp", self.tokens * self.wide) * times
        return {("tp", "all_reduce_max"): one, ("tp", "all_reduce"): (3 if self.args.loss.label_smoothing else 2) * one}

    def messages(self, stage: int) -> Bytes:
        """Each microbatch's activation to the next stage, and its gradient to the one before."""
        cut = self.layout.size("tp") if self.args.parallel.sequence_parallel else 1
        size = self.microbatches * self.activation / cut
        home, found = self.layout.placement, Counter[tuple[str, str]]()
        for other in (stage + 1, stage - 1):
            if 0 <= other < len(home) and home[other] != home[stage]:
                found[f"pp:{home[stage]}>{home[other]}", "send"] += 1
        return {key: size * times for key, times in found.items()}

    def gradients(self, parts: Sequence[StageSpec], at: Mapping[str, int]) -> Bytes:
        """Every gradient once over the replicas; those of which several ranks hold parts once more over these.

        Where the optimizer is sharded a gradient is reduced and scattered, with zero2 once for each microbatch, and the
        weights are gathered; a rank then holds parts of its shard alone. In bf16 each rank adds up its part of what
        comes, and the sums are gathered where all keep them.
        """
        declared, how = self.declared(parts, at), self.args.parallel.mode
        sharded = how != "none" and self.layout.size("dp", "cp") > 1
        found: Bytes = {}
        for replicas, gather in (("dp-cp", "dp:gather-cp"), ("edp", "edp:gather")):
            held = sum(item.param.numel() for item in declared if "-".join(item.replicas) == replicas)
            times, half = self.microbatches if how == "zero2" else 1, self.all_reduce(replicas, held) / 2
            if self.args.parallel.reduce_dtype == "bf16":
                found[replicas, "all_to_all"] = times * half * 2
                found[replicas, "all_gather"] = half * 2 * (not sharded)
            elif sharded:
                found[replicas, "reduce_scatter"] = times * half * self.wide
            else:
                found[replicas, "all_reduce"] = 2 * half * self.wide
            found[gather, "all_gather"] = half * DTYPES[self.args.run.dtype].itemsize * sharded
        for axis in ("tp", "embed", "etp"):
            partial = [each for item in declared for each in item.logical if axis in each.spec.sum_grad]
            if sharded and partial and self.layout.size(axis) > 1:
                raise NotImplementedError("no textbook volumes for parts of sharded gradients yet")
            found[axis, "all_reduce"] = self.all_reduce(axis, sum(_spread(each, axis) for each in partial) * self.wide)
        return found

    def declared(self, parts: Sequence[StageSpec], at: Mapping[str, int]) -> tuple[Declared, ...]:
        """The parameters that a rank stores; nothing is allocated."""
        tp = Axis("tp", at["tp"], tuple(range(self.layout.size("tp"))))
        experts = expert_axes_at(self.layout, at) if self.args.model.experts else ExpertAxes.single()
        sp, dtype = self.args.parallel.sequence_parallel, DTYPES[self.args.run.dtype]
        place = Build(tp, sp, dtype, "meta", experts=experts)
        seq_len = self.args.batch.seq_len
        held = [d for part in parts for d in collect(Transformer(self.args.model, part, place, seq_len=seq_len))]
        return tuple({d.logical[0].name: d for d in held}.values())  # a tied embedding with both ends here is one

    def all_reduce(self, axis: str, size: float) -> float:
        """Bytes that a rank sends in an all-reduce of `size` bytes over all the ranks of an axis."""
        # Both end stages hold a tied embedding; the stages between them none.
        sizes = [self.layout.size(a) for a in axis.split("-")]
        n = math.prod(sizes)
        return 2 * (n - 1) / n * size


def padding(args: Arguments, layout: Layout, rank: int) -> dict[str, float]:
    """Bytes that `rank` may send beyond the textbook, by axis: flat gradients begin each parameter at an aligned
    element, and what travels in bf16 is cut into equal parts."""
    step, at = _Step(args, layout), layout.coords(rank)
    every = stage_specs(args)
    parameters = len(step.declared([every[stage] for stage in layout.stages(rank)], at))
    shards = 1 if args.parallel.mode == "none" else layout.size("dp", "cp") * step.microbatches
    more = parameters * (ALIGNED - 1 + ALIGNED * (shards > 1) * shards) * step.wide
    if args.parallel.reduce_dtype == "bf16":
        more += parameters * layout.size("dp", "cp") * step.microbatches * step.wide
    return {axis: step.all_reduce(axis.replace(":gather", ""), more) for axis in FLAT}


def routed(args: Arguments, layout: Layout, rank: int) -> tuple[float, float]:
    """How much less, and how much more, `rank` may send to experts than with equal loads."""
    every, exchanged = stage_specs(args), Exchanged(args, layout)
    each = [exchanged.slack(every[stage]) for stage in layout.stages(rank)]
    return sum(less for less, _ in each), sum(more for _, more in each)


def _spread(part: Logical, axis: str) -> int:
    """Elements of a partial gradient as it is summed over `axis`: all of the dims that are cut along it."""
    cut = {s.dim for s in part.spec.shard if s.axis == axis}
    sizes = zip(part.spec.shape, part.block.shape, strict=True)
    return math.prod(full if dim in cut else own for dim, (full, own) in enumerate(sizes))
