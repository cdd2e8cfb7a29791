"""The tensors of attention over ranks of cp, or over documents: keys that come, outputs that are merged.

As `stretto.context_parallel` has it. Outputs and gradients are summed in fp32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.schema import Arguments
from stretto.estimate.block_sizes import BlockSizes
from stretto.estimate.context import comm_of
from stretto.estimate.tape import Tape


@dataclass(frozen=True)
class ContextTape:
    """Keys and values of `ranks` come at once, or `rings` blocks of them are under way; a kernel sees `1 / tiles` of
    the queries at a time; heads are exchanged if this is `by_heads`."""

    tape: Tape
    sizes: BlockSizes
    ranks: int
    rings: int
    tiles: int
    by_heads: bool

    @classmethod
    def of(cls, args: Arguments, layer: int, tape: Tape, sizes: BlockSizes) -> ContextTape:
        """Of a layer, by the way in which it communicates."""
        cp = args.parallel.cp
        comm = comm_of(args, layer) if cp > 1 else "all-gather"
        # A rank of several has one run of tokens from the beginning and one from the end of a row.
        tiles = 2 if cp > 1 and comm != "ulysses" else 1
        ring, heads = comm in ("ring", "hybrid"), comm in ("ulysses", "hybrid")
        return cls(tape, sizes, cp if comm == "all-gather" else 1, 2 if ring and cp > 1 else 1, tiles, heads and cp > 1)

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
        t.make(contiguous=s.kv, merged=s.attended * s.wide, merged_lse=s.lse)
        self._blocks()
        part = s.attended // self.tiles
        t.make(tile=part, tile_wide=part * s.wide)
        t.pass_through(weighed=part * s.wide)
        t.free("tile", "tile_wide")
        t.make(rounded=s.attended, rounded_lse=s.lse)
        t.free("contiguous", "blocks", "merged", "merged_lse", "rounded", "rounded_lse")  # the caller makes the output
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
        t.make(dq_wide=s.q * s.wide, contiguous=s.kv)
        self._blocks()
        # Of a ring: what this rank adds, what comes to be added to, and what is still on its way to the next.
        blocks = self.ranks * (3 if self.rings > 1 else 1)
        t.make(dkv_wide=blocks * s.kv * s.wide)
        part = s.q // self.tiles
        t.make(tile=part + (self.ranks * s.kv if self.ranks > 1 else s.kv // self.tiles))
        t.pass_through(widened=part * s.wide)
        if self.ranks > 1:  # in the order of the ranks, and what of it is this rank's
            t.make(in_order=blocks * s.kv * s.wide)
            t.make(own=s.kv * s.wide)
            t.free("in_order")
        t.make(dq=s.q)
        t.make(dkv=s.kv)
        t.free("contiguous", "blocks", "tile", "dq_wide", "dkv_wide", "own")
        self.let_go()
        if self.by_heads:
            t.free("dattended_of_heads")
            t.make(sent=s.q, came=s.q)
            t.free("sent", "came")

    def _blocks(self) -> None:
        t, s = self.tape, self.sizes
        if self.ranks > 1:
            t.make(gathered_kv=self.ranks * s.kv)
            t.make(blocks=self.ranks * s.kv)
            t.free("gathered_kv")
        elif self.rings > 1:
            t.make(blocks=s.kv)
