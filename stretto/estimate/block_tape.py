"""The tensors of a block in the order in which its forward and its backward make them and let go of them.

It follows `stretto.models.block`, with the fused operations of a GPU: a norm, an activation, a rotation is one kernel
that makes its output alone; the adjoint of a gated activation writes where its inputs were.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.schema import Arguments
from stretto.estimate.block_sizes import BlockSizes
from stretto.estimate.context_tape import ContextTape
from stretto.estimate.expert_tape import ExpertTape
from stretto.estimate.gemm_tape import GemmTape
from stretto.estimate.kept import BLOCK, NOTHING, Parts
from stretto.estimate.tape import Moment, Tape


@dataclass(frozen=True)
class BlockMoments:
    """Of one block and microbatch, with what it keeps, and with the gradient of what leaves it."""

    kept: int
    """After its forward; what leaves it enters the next one."""
    forward: Moment
    backward: Moment


def block_moments(args: Arguments, layer: int, parts: Parts) -> BlockMoments:
    """Of a layer that computes `parts` once more."""
    whole = parts == BLOCK
    tape = _Block.of(args, layer, NOTHING if whole else parts, Tape())
    tape.tape.make(x=tape.sizes.x)
    tape.forward(keep=not whole)
    forward = tape.tape.most
    tape.tape.free("out")
    kept = tape.tape.now
    back = _Block.of(args, layer, NOTHING if whole else parts, Tape(**tape.tape.live, dout=tape.sizes.x))
    if whole:
        back.forward(keep=True)
        back.tape.free("out")
    back.backward()
    return BlockMoments(kept, forward, back.tape.most)


@dataclass(frozen=True)
class _Block:
    tape: Tape
    sizes: BlockSizes
    gemms: GemmTape
    context: ContextTape | None
    experts: ExpertTape | None
    args: Arguments
    parts: Parts

    @classmethod
    def of(cls, args: Arguments, layer: int, parts: Parts, tape: Tape) -> _Block:
        m, p = args.model, args.parallel
        sparse = m.is_sparse(layer)
        sizes = BlockSizes.of(args, m.shared_ffn if sparse else m.dim_ffn)
        gemms = GemmTape(tape, sizes, p.tp, p.sequence_parallel)
        context = ContextTape.of(args, layer, tape, sizes) if p.cp > 1 or args.data.packing else None
        experts = ExpertTape.of(args, tape, selective="activation" in parts) if sparse else None
        return cls(tape, sizes, gemms, context, experts, args, parts)

    @property
    def before(self) -> bool:
        return self.args.model.norm_placement != "post"

    @property
    def after(self) -> bool:
        return self.args.model.norm_placement != "pre"

    def forward(self, *, keep: bool) -> None:
        """From x to out, and what stays where it is to `keep`."""
        t, s = self.tape, self.sizes
        lazy = self.before and "norms" in self.parts
        with t.during("forward of attention"):
            if self.before and not lazy:
                t.make(n1=s.x)
            self._attention(lazy=lazy, keep=keep, kept=keep)
            if self.after:
                t.make(added_normed=s.x)
                if not keep:
                    t.free("added")
            t.make(mid=s.x)
        # What is added to the residual is a local name until the block ends.
        with t.during(f"forward of {'experts' if self.experts else 'feed-forward'}"):
            lazy = lazy and self.experts is None
            if self.before and not lazy:
                t.make(n2=s.x)
            if self.experts is not None:
                self.experts.forward(keep=keep)
                if self.args.model.shared_ffn:
                    self._feed_forward(lazy=False, keep=keep, kept=keep)
                    t.make(more_added=s.x)
                    t.free("more")
                if not keep:
                    t.free("n2")
            else:
                self._feed_forward(lazy=lazy, keep=keep, kept=keep)
            if self.after:
                t.make(more_normed=s.x)
                if not keep:
                    t.free("more")
            t.make(out=s.x)
        t.free("added_normed", "more_normed", "more_added")
        if not self.after or not keep:
            t.free("added", "more")
        if not keep:
            t.free("mid")

    def _attention(self, *, lazy: bool, keep: bool, kept: bool) -> None:
        """From what enters the block to what is added; `keep` what `parts` do not compute once more."""
        t, s = self.tape, self.sizes
        region = "projections" in self.parts and keep
        self._heads(lazy=lazy, keep=keep and not region)
        if self.context is not None:
            self.context.forward()
        t.make(attended=s.attended, lse=s.lse)
        again = keep and ("attention" in self.parts or region)
        if again or not keep:
            t.free("lse")
        if region or not keep:
            t.free("heads", "normed", "wide_norms", "kv")
        self.gemms.row("attended", keep=keep and "attention" not in self.parts, added=s.x)
        del kept

    def _heads(self, *, lazy: bool, keep: bool) -> None:
        t, s = self.tape, self.sizes
        self.gemms.column("n1", made_for_it=lazy, keep=keep or "projections" in self.parts, heads=s.heads)
        if s.normed:
            if s.wide_norms:
                t.make(wide_norms=s.wide_norms)
                t.pass_through(squares=s.q * s.wide)
            t.make(normed=s.normed)

    def _feed_forward(self, *, lazy: bool, keep: bool, kept: bool) -> None:
        t, s = self.tape, self.sizes
        region = keep and ("projections" in self.parts or self.args.run.ffn_chunks > 1)
        if s.inner == 0:
            return
        self.gemms.column("n2", made_for_it=lazy, keep=keep, inner=s.inner)
        t.make(activated=s.activated)
        made = keep and "activation" not in self.parts and self.args.run.ffn_chunks == 1
        if region or not keep:
            t.free("inner")
        self.gemms.row("activated", keep=made, more=s.x)
        del kept

    def backward(self) -> None:
        """From dout to dx, of what the forward has kept."""
        t, s = self.tape, self.sizes
        lazy = self.before and "norms" in self.parts
        with t.during(f"backward of {'experts' if self.experts else 'feed-forward'}"):
            if self.after:
                t.make(dmore=s.x)
                t.free("more")
            if self.experts is not None:
                if self.args.model.shared_ffn:
                    self._feed_forward_back(lazy=False, past="", dx="dshared")
                self.experts.backward()
                self._norm_back("dmid")
            else:
                self._feed_forward_back(lazy=lazy, past="dout", dx="dmid")
            t.free("mid", "dmore", "n2")
        with t.during("backward of attention"):
            if self.after:
                t.make(dadded=s.x)
                t.free("added")
            self._attention_back(lazy=lazy)
            t.free("x", "dadded", "n1")

    def _norm_back(self, dx: str) -> None:
        t, s = self.tape, self.sizes
        if self.args.model.shared_ffn:
            t.pass_through(dsum=s.x)
        t.make(**{dx: s.x})
        t.free("dn2", "dshared", "dout")

    def _feed_forward_back(self, *, lazy: bool, past: str, dx: str) -> None:
        t, s = self.tape, self.sizes
        chunked = self.args.run.ffn_chunks > 1
        if chunked or ("projections" in self.parts and "activation" in self.parts):
            t.make(inner=s.inner, activated=s.activated)
        self.gemms.row_back("dout", "" if self._in_place else "activated", dactivated=s.activated)
        if "projections" in self.parts and "activation" not in self.parts:
            t.make(inner=s.inner, activated_again=s.activated)
            t.free("activated_again")
        if not self._in_place:
            lazily = "activation" in self.parts and "projections" not in self.parts
            t.make(dinner=s.inner, **({"activated": s.activated} if lazily else {}))
            t.free("inner")
        elif "activation" not in self.parts or "projections" in self.parts or chunked:
            self.gemms._weight_gradient("activated")
        if self.gemms.tp > 1 and self._in_place and "activation" in self.parts:
            t.hold_back("dactivated")  # the output was made in its place
        else:
            t.free("dactivated")
        if not self._in_place and "activation" in self.parts:
            self.gemms._weight_gradient("activated")
        norm = self.before
        self.gemms.column_back("inner" if self._in_place else "dinner", "n2", made_for_it=lazy, norm=norm, dx=dx, past=past)

    @property
    def _in_place(self) -> bool:
        """Whether the adjoint of the activation writes where its inputs were."""
        return self.args.model.activation == "swiglu"

    def _attention_back(self, *, lazy: bool) -> None:
        t, s = self.tape, self.sizes
        region, again = "projections" in self.parts, "attention" in self.parts
        if region and again:
            self._heads_again(lazy=lazy)
            t.make(attended=s.attended, lse=s.lse)
        self.gemms.row_back("dmid", "" if again and not region else "attended_twice", dattended=s.attended)
        if region and not again:
            self._heads_again(lazy=lazy)
            t.make(lse=s.lse, attended_again=s.attended)
        if again and not region:
            t.make(attended=s.attended, lse=s.lse)
        if self.context is not None:
            self.context.backward()
        else:
            t.make(dq=s.q, dkv=s.kv)
        t.free("dattended", "lse", "attended_again")
        self.gemms._weight_gradient("attended")
        if self.context is None and not self.args.model.latent and not s.normed:
            t.free("heads")
        t.free("normed", "kv")
        if s.wide_norms:
            t.pass_through(dwide=3 * s.q * s.wide)
            t.free("wide_norms")
        if self.args.model.position == "rope" or s.normed:
            t.make(dheads=s.q + s.kv)
            t.free("dq", "dkv")
        t.free("heads")
        self.gemms.column_back("dheads", "n1", made_for_it=lazy, norm=self.before, dx="dx", past="dmid")
        t.free("dq", "dkv")

    def _heads_again(self, *, lazy: bool) -> None:
        t, s = self.tape, self.sizes
        if lazy:
            t.pass_through(n1_again=s.x)
        t.make(heads=s.heads, **({"normed": s.normed} if s.normed else {}))
        if s.wide_norms:
            t.make(wide_norms=s.wide_norms)
