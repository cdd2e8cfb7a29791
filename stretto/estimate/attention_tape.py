"""The tensors of a block's attention, from the normed stream to what is added, and back.

It follows `stretto.models.attention`. Latents count as queries, keys and values of all heads, which they become.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.estimate.block_sizes import BlockSizes
from stretto.estimate.context_tape import ContextTape
from stretto.estimate.gemm_tape import GemmTape
from stretto.estimate.kept import Parts
from stretto.estimate.tape import Tape


@dataclass(frozen=True)
class AttentionTape:
    """On one rank of cp where there is no `context`. `parts` are recomputed, heads turned if `rotated`."""

    tape: Tape
    sizes: BlockSizes
    gemms: GemmTape
    context: ContextTape | None
    parts: Parts
    rotated: bool

    @property
    def _heads_again(self) -> bool:
        return "projections" in self.parts

    @property
    def _scores_again(self) -> bool:
        return "attention" in self.parts

    def forward(self, *, lazy: bool, keep: bool) -> None:
        """From n1, that is made for the GEMM if `lazy`, to added."""
        t, s = self.tape, self.sizes
        self.gemms.column("n1", made_for_it=lazy, keep=keep, recompute=self._heads_again, heads=s.heads)
        if keep and s.read_twice:
            t.make(read=s.read_twice)
        self._normed()
        self._attend(keep=keep and not (self._heads_again or self._scores_again))
        if self._heads_again or not keep:
            t.free("heads", "normed_q", "normed_k", "clipped")
        kept = keep and not self._scores_again
        self.gemms.row("attended", s.attended, keep=kept, others_keep=kept and not self._heads_again, out="added")

    def backward(self, *, lazy: bool) -> None:
        """From dmid, the gradient of what is added, to dx."""
        t, s = self.tape, self.sizes
        both = self._heads_again and self._scores_again
        if both:
            self._once_more(lazy=lazy)
        others_keep = both or not (self._heads_again or self._scores_again)
        others_keep &= self.context is None or not self.context.by_heads
        self.gemms.row_back("dadded", "" if others_keep else "attended", dattended=s.attended)
        t.free("dout")  # of a region, which ends here
        if self._heads_again and not both:
            self._once_more(lazy=lazy)
        elif self._scores_again and not both:
            self._attend(keep=True)
        if self.context is not None:
            self.context.backward()
        else:
            t.make(dq=s.q, dkv=s.kv)
            t.pass_through(scratch=s.scratch)
        t.free("dattended", "lse", "clipped", *(() if s.clipped or (self.rotated and s.normed_q) else ["heads"]))
        self.gemms.weight_gradient("attended", "attended_quantized")
        t.free(*(() if s.clipped else ("normed_q", "normed_k")))
        if self.rotated or s.normed_q or s.clipped:
            t.make(dheads=s.q + s.kv)
            t.free(*(() if self.gemms.in_region else ("dq", "dkv")))
        t.pass_through(dclipped=s.clipped)
        t.free("heads", "normed_q", "normed_k")
        self.gemms.column_back("dheads", s.q + s.kv, "n1", made_for_it=lazy, dx="dx", past="dmid")
        t.free("dq", "dkv", "read", "dmid")

    def _normed(self) -> None:
        t, s = self.tape, self.sizes
        if s.normed_q:
            t.make(normed_q=s.normed_q, normed_k=s.normed_k)
        if s.clipped:
            t.make(clipped=s.clipped)

    def _attend(self, *, keep: bool) -> None:
        """Attention itself: with cp its keys were copied beside their values, and nobody keeps them as they were."""
        t, s = self.tape, self.sizes
        if self.context is not None:
            self.context.forward(keep_heads=not keep)
        t.make(attended=s.attended, lse=s.lse)
        if not keep:
            t.free("lse")
        if self.context is not None:
            if not keep:
                self.context.let_go()
            elif self._heads_again or not self._scores_again:  # else they are what attention is computed from once more
                t.free("normed_k")

    def _once_more(self, *, lazy: bool) -> None:
        """All between the norm and the last GEMM."""
        t, s = self.tape, self.sizes
        if lazy:
            t.pass_through(n1_again=s.x)
        self.gemms.gather_again()
        t.make(heads=s.heads)
        self._normed()
        self._attend(keep=True)
