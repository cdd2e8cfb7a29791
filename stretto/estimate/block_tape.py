"""The tensors of a block in the order in which its forward and its backward make them and let go of them.

It follows `stretto.models.block`, with the fused operations of a GPU: a norm, an activation, a rotation is one kernel
that makes its output alone; the adjoint of a gated activation writes where its inputs were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stretto.arguments.schema import Arguments
from stretto.estimate.attention_tape import AttentionTape
from stretto.estimate.block_sizes import BlockSizes
from stretto.estimate.context_tape import ContextTape
from stretto.estimate.expert_tape import ExpertTape
from stretto.estimate.gemm_tape import GemmTape
from stretto.estimate.halves import in_turns, one_by_one
from stretto.estimate.kept import BLOCK, NOTHING, Parts
from stretto.estimate.regions import in_regions
from stretto.estimate.tape import Moment, Tape
from stretto.schedule.blocks import StageBlock


@dataclass(frozen=True)
class BlockMoments:
    """Of one block and microbatch, with what it keeps, and with the gradient of what leaves it."""

    kept: int
    """After its forward; what leaves it enters the next one."""
    forward: Moment
    backward: Moment


def block_moments(args: Arguments, block: StageBlock, parts: Parts) -> BlockMoments:
    """Of a block, as far as it is on a stage, that recomputes `parts`."""
    forward, kept, backward = _tapes(args, block, parts)
    return BlockMoments(kept, forward.most, backward.most)


def halves_moments(args: Arguments, block: StageBlock, parts: Parts, *, first: bool) -> BlockMoments:
    """The same where microbatches go through it in two halves; of the `first` none comes from a block before."""
    half = replace(args, batch=replace(args.batch, micro_batch=args.batch.micro_batch // 2))
    forward, kept, backward = _tapes(half, block, parts)
    if parts == BLOCK or not (block.feed_forward and args.model.is_sparse(block.layer)):  # one after the other
        found = one_by_one(forward, kept, backward)
    else:
        alone = first or args.model.norm_placement != "pre"  # with norms after sublayers a block ends before the next
        found = in_turns(forward, kept, backward, alone=alone)
    return BlockMoments(2 * kept, *found)


def _tapes(args: Arguments, block: StageBlock, parts: Parts) -> tuple[Tape, int, Tape]:
    """Forward, bytes that are kept, backward."""
    whole = parts == BLOCK
    region = in_regions(args, block, parts)
    tape = _Block.of(args, block, NOTHING if whole else parts, Tape(), in_region=region)
    tape.tape.make(x=tape.sizes.x)
    tape.forward(keep=not whole)
    live = tape.tape.live
    del live["out"]
    # The gradient of what leaves attention is that of the stream in the middle of a block.
    leaving = "dout" if block.feed_forward else "dmid"
    after = Tape(**live, **{leaving: tape.sizes.x})
    back = _Block.of(args, block, NOTHING if whole else parts, after, in_region=region)
    if whole:
        back.tape.rename(plan="plan_before")  # the plan of the first forward is the one that its backward has
        back.forward(keep=True, ends=False)
        back.tape.free("plan_before")
    back.backward()
    return tape.tape, sum(live.values()), back.tape


@dataclass(frozen=True)
class _Block:
    tape: Tape
    sizes: BlockSizes
    gemms: GemmTape
    attention: AttentionTape
    experts: ExpertTape | None
    args: Arguments
    block: StageBlock
    parts: Parts

    @classmethod
    def of(cls, args: Arguments, block: StageBlock, parts: Parts, tape: Tape, *, in_region: bool) -> _Block:
        m, p, layer = args.model, args.parallel, block.layer
        sparse = block.feed_forward and m.is_sparse(layer)
        sizes = BlockSizes.of(args, m.shared_ffn if sparse else m.dim_ffn, parts)
        gemms = GemmTape(tape, sizes, p.tp, p.sequence_parallel, args.run.fp8, in_region)
        context = ContextTape.of(args, layer, tape, sizes) if p.cp > 1 or args.data.packing else None
        experts = ExpertTape.of(args, tape, selective="activation" in parts) if sparse else None
        attention = AttentionTape(tape, sizes, gemms, context, parts, m.position == "rope")
        return cls(tape, sizes, gemms, attention, experts, args, block, parts)

    @property
    def before(self) -> bool:
        return self.args.model.norm_placement != "post"

    @property
    def after(self) -> bool:
        return self.args.model.norm_placement != "pre"

    def forward(self, *, keep: bool, ends: bool = True) -> None:
        """From x to out, and what stays where it is to `keep`; recomputed it `ends` no later than that."""
        if self.block.attention:
            self._attention(keep=keep, ends=ends)
        if self.block.feed_forward:
            self._after_attention(keep=keep, ends=ends)
        t = self.tape
        t.free("added_normed", "more_normed", *(() if keep else ["mid"]))
        if not self.after or not keep:
            t.free("added", "more", "both")

    def _attention(self, *, keep: bool, ends: bool) -> None:
        """From x to mid, which leaves the stage where the feed-forward is on the next."""
        t, s = self.tape, self.sizes
        lazy, alone = self.before and "norms" in self.parts, not self.block.feed_forward
        with t.during("forward of attention"):
            if self.before and not lazy:
                t.make(n1=s.x)
            self.attention.forward(lazy=lazy, keep=keep)
            if self.after:
                t.make(added_normed=s.x)
                if not keep:
                    t.free("added")
            if not alone:
                t.make(mid=s.x)
                if self.gemms.in_region:  # else it is a local name until the block ends
                    t.free("added_normed", *(() if self.after else ("added",)))
            elif ends:
                t.make(out=s.x)
        if alone:
            t.release("n1")

    def _after_attention(self, *, keep: bool, ends: bool) -> None:
        """From mid, or x where attention is on the stage before, to out."""
        t, s = self.tape, self.sizes
        lazy = self.before and "norms" in self.parts
        with t.during(f"forward of {self._name}"):
            lazy = lazy and self.experts is None
            if self.before and not lazy:
                t.make(n2=s.x)
            t.release("n1")
            self._second(lazy=lazy, keep=keep, ends=ends or self.after)
            if self.after:
                t.make(more_normed=s.x)
                if not keep:
                    t.free("more", "both")
            if ends:
                t.make(out=s.x)
        t.release("n2")

    @property
    def _name(self) -> str:
        return "feed-forward" if self.experts is None else "experts"

    def _second(self, *, lazy: bool, keep: bool, ends: bool) -> None:
        """From the normed stream to what is added to it the second time."""
        t, s = self.tape, self.sizes
        if self.experts is None:
            self._feed_forward(lazy=lazy, keep=keep, out="more")
            return
        if self.args.model.shared_ffn:
            self._feed_forward(lazy=False, keep=keep, out="beside")
        self.experts.forward(keep=keep)
        if self.args.model.shared_ffn and ends:
            t.make(both=s.x)
            t.free("more", "beside")
        if not keep:
            t.free("n2")

    def _feed_forward(self, *, lazy: bool, keep: bool, out: str) -> None:
        t, s = self.tape, self.sizes
        self.gemms.column("n2", made_for_it=lazy, keep=keep, recompute=self._feed_forward_again, inner=s.inner)
        t.make(activated=s.activated)
        if self._feed_forward_again or not keep:
            t.free("inner")
        made_again = "activation" in self.parts or self._chunked
        self.gemms.row("activated", s.activated, keep=keep and not made_again, out=out)

    @property
    def _chunked(self) -> bool:
        return self.args.run.ffn_chunks > 1

    @property
    def _feed_forward_again(self) -> bool:
        """Whether its first GEMM is recomputed."""
        return "projections" in self.parts or self._chunked

    def backward(self) -> None:
        """From dout to dx, of what the forward has kept."""
        if self.block.feed_forward:
            self._back_to_attention()
        if self.block.attention:
            t, s = self.tape, self.sizes
            with t.during("backward of attention"):
                if self.after:
                    t.make(dadded=s.x)
                    t.free("added")
                self.attention.backward(lazy=self.before and "norms" in self.parts)
                t.free("x", "n1")

    def _back_to_attention(self) -> None:
        """From dout to dmid, which leaves the stage where attention is on the one before."""
        t, s = self.tape, self.sizes
        lazy = self.before and "norms" in self.parts
        with t.during(f"backward of {self._name}"):
            if self.after:
                t.make(dmore=s.x)
                t.free("more", "both")
            if self.experts is not None:
                self.experts.backward(after="" if self.args.model.shared_ffn else "dmore")
                if self.args.model.shared_ffn:
                    self._feed_forward_back(lazy=False, past="", dx="dbeside")
                t.make(dmid=s.x)
                t.free("dn2", "dbeside", "dout")
            else:
                self._feed_forward_back(lazy=lazy, past="dout", dx="dmid")
            t.free("mid" if self.block.attention else "x", "n2", *(() if self.block.attention else ("dout",)))

    def _feed_forward_back(self, *, lazy: bool, past: str, dx: str) -> None:
        t, s, m = self.tape, self.sizes, self.args.model
        in_place, made_again = m.activation == "swiglu", "activation" in self.parts
        if self._chunked:  # the gradients of the chunks before are there
            t.make(dchunks=s.x - s.x // self.args.run.ffn_chunks)
        if self._feed_forward_again and (made_again or self._chunked):  # both GEMMs are in what is recomputed
            self.gemms.gather_again()
            t.make(inner=s.inner, activated=s.activated)
            lazily = False
        else:
            lazily = made_again
        self.gemms.row_back("dmore", None if lazily else "activated", dactivated=s.activated)
        if self._feed_forward_again and not (made_again or self._chunked):
            self.gemms.gather_again()
            t.make(inner=s.inner)
            t.pass_through(activated_again=s.activated)
        if not in_place:
            t.make(dinner=s.inner, **({"activated": s.activated} if lazily else {}))
            t.free("inner", "dactivated")
            self.gemms.weight_gradient("dmore", "whole_dy", "activated", "activated_quantized")
        elif lazily:  # the output was made in the place of its gradient
            self.gemms.weight_gradient("dmore", "whole_dy", "dactivated")
        else:
            t.free("dactivated")
        # Of experts that all tokens go through, the router reads the same, and the norm's adjoint comes after both.
        beside = self.experts is not None
        self.gemms.column_back(
            "inner" if in_place else "dinner",
            s.inner,
            "" if beside else "n2",
            made_for_it=lazy,
            dx=dx,
            past=past,
        )
        t.free("dchunks")
