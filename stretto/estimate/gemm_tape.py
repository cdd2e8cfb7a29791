"""What a GEMM of the blocks makes and lets go of, forward and back, and the norm in front of it.

As `stretto.tensor_parallel.linear` has it: over ranks of tp the sequence is gathered or the output summed, and a weight
gradient waits for the next collective, with both factors.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.estimate.block_sizes import BlockSizes
from stretto.estimate.tape import Tape


@dataclass(frozen=True)
class GemmTape:
    """GEMMs over `tp` ranks, which cut the sequence outside if it is `cut`.

    In FP8 a factor is written in a byte for each number, twice where both gradients take it; what is kept is that of a
    weight gradient in FP8.
    """

    tape: Tape
    sizes: BlockSizes
    tp: int
    cut: bool
    fp8: str = "none"
    in_region: bool = False
    """Nothing is held by local names, but a gradient that comes to one of its two nodes until that ends."""

    def column(self, x: str, *, made_for_it: bool, keep: bool, recompute: bool = False, **out: int) -> None:
        """From the stream to features: x, which is `made_for_it` or lives, and is kept for the weight gradient, or as
        what the GEMM is computed from for a `recompute`."""
        t, s = self.tape, self.sizes
        if made_for_it:
            t.make(**{x: s.x})
        if self.cut:
            t.make(gathered=s.whole)
        kept = keep and not made_for_it
        self._quantize(s.whole, twice=kept and not recompute)
        t.make(**out)
        t.free("quantized")
        # What was made before the sublayer is a local name until that returns.
        let_go = t.free if made_for_it or self.in_region else t.hold
        if not kept or recompute:
            t.free("gathered")
            let_go(*(() if kept else (x,)))
        elif self.cut or self._fp8_wgrad:
            t.free("gathered")
            let_go(x)
            t.make(**{x: s.whole // (s.item if self._fp8_wgrad else 1)})

    def gather_again(self) -> None:
        """What a GEMM is computed from once more is gathered, and behind that weight gradients are computed."""
        if self.cut:
            self.tape.make(gathered=self.sizes.whole)
            self.tape.flush()

    def row(self, x: str, size: int, *, keep: bool, out: str, others_keep: bool = False) -> None:
        """From features x of so many bytes back to the stream: a sum over tp. Others may keep x beside."""
        t = self.tape
        self._quantize(size, twice=keep)
        t.make(**({"partial": self.sizes.whole} if self.tp > 1 else {out: self.sizes.x}))
        t.free("quantized")
        if keep and self._fp8_wgrad:
            t.make(**{f"{x}_quantized": size // self.sizes.item})
        t.make(**{out: self.sizes.x})
        t.free("partial")
        if not others_keep and (self._fp8_wgrad or not keep):
            t.free(x)

    def row_back(self, dy: str, x: str | None, **dx: int) -> None:
        """dx of dy, unnamed where the residual has it, too; x and the whole dy for the weight gradient, which comes
        later where x is not there yet: None."""
        t = self.tape
        if self.cut:
            t.make(whole_dy=self.sizes.whole)
            t.flush()
        self._quantize(self.sizes.whole, twice=True)
        t.make(**dx)
        if x is not None:
            self.weight_gradient(*(() if self.cut else (dy,)), "whole_dy", x, f"{x}_quantized")
        t.free("quantized", *((dy,) if self.cut else ()))

    def column_back(self, dy: str, width: int, x: str, *, made_for_it: bool, dx: str, past: str) -> None:
        """The gradient `dx` of what enters the norm, from dy of so many bytes and from what goes `past` it."""
        t, s = self.tape, self.sizes
        self._quantize(width, twice=True)
        t.make(**({"whole_dx": s.whole} if self.tp > 1 else {"dn": s.x}))
        t.free("quantized")
        if self._fp8_wgrad:  # the one that lies as the weight gradient takes it
            t.make(quantized=width // s.item)
        t.make(dn=s.x)
        t.flush()
        t.free("whole_dx")
        if not made_for_it:
            self.weight_gradient(dy, x, "gathered")
        t.make(**{dx: s.x}, **({x: s.x} if made_for_it else {}))
        t.free("dn", *(("gathered",) if made_for_it else ()), *(() if self.in_region else (past,)))
        if made_for_it:
            if self.cut:
                t.make(again=s.whole)
                t.free(x)
            self.weight_gradient(dy, x, "again")
        t.free("quantized")

    @property
    def _fp8_wgrad(self) -> bool:
        """Whether a weight gradient takes factors of FP8."""
        return self.fp8 == "tensorwise"

    def _quantize(self, size: int, *, twice: bool) -> None:
        if self.fp8 != "none":
            self.tape.make(quantized=size // self.sizes.item * (1 + (twice and self._fp8_wgrad)))

    def weight_gradient(self, *factors: str) -> None:
        """Of a GEMM with these factors, which nobody else holds."""
        (self.tape.hold_back if self.tp > 1 else self.tape.free)(*factors)
