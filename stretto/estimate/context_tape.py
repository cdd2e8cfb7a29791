"""The tensors of attention over ranks of cp, or over documents: keys that come, outputs that are merged.

As `stretto.context_parallel` has it. Outputs and gradients are summed in fp32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.schema import Arguments
from stretto.estimate.block_sizes import BlockSizes
from stretto.estimate.context import comm_of, needed_share
from stretto.estimate.tape import Tape


@dataclass(frozen=True)
class ContextTape:
    """Keys and values of `ranks` come at once, or of other ranks as many as `came` ranks have, or `rings` blocks of
    them are in flight; heads are exchanged if this is `by_heads`. What tiles give of queries is kept until all are
    there: most have a tile along the diagonal, and one before it."""

    tape: Tape
    sizes: BlockSizes
    ranks: int
    rings: int
    by_heads: bool
    came: float = 0.0

    @classmethod
    def of(cls, args: Arguments, layer: int, tape: Tape, sizes: BlockSizes) -> ContextTape:
        """Of a layer, by the way in which it communicates."""
        cp = args.parallel.cp
        comm = comm_of(args, layer) if cp > 1 else "all-gather"
        ring, heads = comm in ("ring", "hybrid"), comm in ("ulysses", "hybrid")
        came = (cp - 1) * needed_share(args, layer) if comm == "needed" else 0.0
        return cls(tape, sizes, cp if comm == "all-gather" else 1, 2 if ring and cp > 1 else 1, heads and cp > 1, came)

    @property
    def _came(self) -> int:
        return int(self.came * self.sizes.kv)

    @property
    def _needed(self) -> int:
        """Those that came, and of this rank's all but its last block."""
        return self._came + self.sizes.kv // 2

    def forward(self, *, keep_heads: bool) -> None:
        """Up to the output, which is made when all is merged. After heads were exchanged their own may be gone."""
        t, s = self.tape, self.sizes
        t.make(kv=s.kv)
        if self.by_heads:
            t.make(sent=s.q, came=s.q)
            t.make(q_of_heads=s.q)
            t.free("sent", "came")
            t.make(sent=s.kv, came=s.kv)
            t.make(kv_of_heads=s.kv)
            t.free("sent", "came", "kv", *(() if keep_heads else ("heads", "normed")))
        if self.ranks > 1:
            t.make(gathered_kv=self.ranks * s.kv)
        elif self.came:
            t.make(came=self._came)
        elif self.rings > 1:
            t.make(blocks=s.kv)
        t.make(squares=s.attended, squares_lse=s.lse)
        if self.ranks > 1:
            t.make(blocks=self.ranks * s.kv)
            t.free("gathered_kv")
        elif self.came:
            self._picked()
        if self.ranks > 1 or self.rings > 1 or self.came:
            t.make(before=s.attended, before_lse=s.lse)
        t.make(merged=s.attended, merged_lse=s.lse)
        parts = ("squares", "squares_lse", "before", "before_lse")
        t.free("blocks", *parts, "merged", "merged_lse")  # the caller makes the output
        if self.by_heads:
            t.make(attended_of_heads=s.attended, sent=s.attended, came=s.attended)
            t.free("sent", "came")

    def let_go(self) -> None:
        """Nothing of the forward is kept."""
        self.tape.free("kv", "q_of_heads", "kv_of_heads", "attended_of_heads", "lse")

    def backward(self) -> None:
        """From the output's gradient to those of queries, keys and values."""
        t, s = self.tape, self.sizes
        if self.by_heads:
            t.make(sent=s.attended, came=s.attended)
            t.make(dattended_of_heads=s.attended)
            t.free("sent", "came", "dattended")
        if self.ranks > 1:
            self._gathered()
        elif self.came:
            self._needed_back()
        else:
            self._own()
        t.make(dq=s.q)
        t.make(dkv=s.kv)
        t.free("blocks", "tile", "dq_squares", "dq_before", "dkv_wide", "own")
        self.let_go()
        if self.by_heads:
            t.free("dattended_of_heads")
            t.make(sent=s.q, came=s.q)
            t.free("sent", "came")

    def _own(self) -> None:
        """Of keys that are here, or come one rank's after another."""
        t, s = self.tape, self.sizes
        if self.rings > 1:
            t.make(blocks=s.kv)
        t.make(own=s.kv * s.wide)
        t.make(dq_squares=s.q, tile=s.kv)
        if self.rings > 1:
            # What this rank adds, what came to be added to, both of the block before, and what comes home.
            t.make(dq_before=s.q, dkv_wide=3 * s.kv * s.wide)
            t.free("dkv_wide")
            t.make(dkv_wide=s.kv * s.wide)

    def _picked(self) -> None:
        """The keys that are needed, out of this rank's and those that came."""
        self.tape.make(gathered_kv=self.sizes.kv + self._came)
        self.tape.free("came")
        self.tape.make(blocks=self._needed)
        self.tape.free("gathered_kv")

    def _needed_back(self) -> None:
        """As if all were gathered; what leaves is put in order first, as is what stays."""
        t, s = self.tape, self.sizes
        t.make(own=s.kv * s.wide, came=self._came)
        t.make(dq_squares=s.q // 2)
        t.pass_through(tile=s.kv // 2)
        self._picked()
        t.make(dkv_wide=self._needed * s.wide)
        t.make(dq_before=s.q // 2)
        t.make(tile=self._needed)
        t.make(in_order=self._came * s.wide)
        t.make(leaving=s.kv * s.wide)
        t.free("blocks", "dkv_wide", "tile")
        t.make(dq_squares=s.q, tile=s.kv // 2)
        t.free("tile", "in_order", "leaving")

    def _gathered(self) -> None:
        """Some squares while keys come, the others while the gradients of what lies before them leave."""
        t, s = self.tape, self.sizes
        t.make(own=s.kv * s.wide, gathered_kv=self.ranks * s.kv)
        t.make(dq_squares=s.q // 2)
        t.pass_through(tile=s.kv // 2)
        t.make(blocks=self.ranks * s.kv)
        t.free("gathered_kv")
        t.make(dkv_wide=self.ranks * s.kv * s.wide)
        t.make(dq_before=s.q // (2 if self.ranks == 2 else 1))
        t.make(tile=self.ranks * s.kv - s.kv // 2)
        t.make(in_order=self.ranks * s.kv * s.wide)
        t.make(leaving=s.kv * s.wide)
        t.free("blocks", "dkv_wide", "tile")
        t.make(dq_squares=s.q, tile=s.kv // 2)
        t.free("tile", "in_order", "leaving")
