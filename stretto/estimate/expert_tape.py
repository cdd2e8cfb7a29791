"""The tensors of a layer of experts, forward and back, where experts have equal loads.

As `stretto.experts` has it: the rows of all assignments exist as often as they are put in order or sent back.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.schema import Arguments
from stretto.estimate.kept import plan_bytes, router_bytes
from stretto.estimate.sizes import BYTES, crossing, local_tokens, most_crossing
from stretto.estimate.tape import Tape
from stretto.estimate.workspace import message_over_ep


@dataclass(frozen=True)
class ExpertTape:
    """Of tokens `leaving` bytes go, `came` arrive, of which `here` are the rows of this rank's experts, and `rows` come
    back; of each row `inner` bytes enter the activation."""

    tape: Tape
    x: int
    """Of the tokens themselves."""
    router: int
    """What the router keeps."""
    plan: int
    """Where rows go and come from: kept also by a block that is computed once more."""
    leaving: int
    came: int
    rows: int
    numbers: int
    """A weight of each row, and its gradient; where they travel, also in the other order, and where that is."""
    here: int
    inner: int
    activated: int
    exchanges: bool
    engines: bool
    """Whether rows that go back are put in order as they leave, not before."""
    recompute: bool
    in_place: bool
    item: int
    """Of one number."""
    scales: int | None
    """In FP8 those of the rows that a GEMM takes."""

    @classmethod
    def of(cls, args: Arguments, tape: Tape, *, selective: bool) -> ExpertTape:
        """With `selective` recomputation neither rows nor the activation's output are kept."""
        m, p, item = args.model, args.parallel, BYTES[args.run.dtype]
        tokens = local_tokens(args)
        share = -(-tokens // p.tp)
        rows = share * m.top_k
        exchanges = p.ep * p.etp > 1
        return cls(
            tape,
            x=item * share * m.hidden,
            router=router_bytes(args),
            plan=plan_bytes(args),
            leaving=item * m.hidden * (share * most_crossing(args) if exchanges else rows),
            came=int(item * m.hidden * share * crossing(args)),
            rows=item * rows * m.hidden,
            numbers=rows * ((4 * max(4, item) + 8) if exchanges else 3 * max(4, item)),
            here=item * rows * p.etp * m.hidden,
            inner=item * rows * m.dim_expert * (2 if m.gated else 1),
            activated=item * rows * m.dim_expert,
            exchanges=exchanges,
            engines=message_over_ep(args) is not None,
            recompute=selective and not exchanges,
            in_place=m.activation == "swiglu",
            item=item,
            scales=None if args.run.fp8 == "none" else 4 * rows * p.etp,
        )

    def forward(self, *, keep: bool) -> None:
        """From n2 to what is added; it may be left at each `Stop` of `stretto.experts.run`."""
        t = self.tape
        t.make(router=self.router, plan=self.plan)
        t.make(rows=self.leaving)
        if self.exchanges:
            t.leave()
            t.leave()  # what ranks ask each other is small
            t.make(came=self.came)
            t.leave()
            t.free("rows")  # as they left: a message holds them until it is waited for
            t.make(rows=self.here)
            t.free("came")
        self._gemm(self.here, inner_rows=self.inner)
        if self.recompute:
            t.free("rows")
        t.make(activated_rows=self.activated)
        self._gemm(self.activated, out_rows=self.here)
        if self.exchanges and not self.engines:
            t.make(back_in_order=self.here)
            t.free("out_rows")
        t.free("activated_rows")
        if self.exchanges:
            t.leave()
            t.make(back=self.rows)
            t.leave()
            t.free("back_in_order", "out_rows")
        t.make(more=self.x)
        t.free("out_rows", "back")
        if not keep:
            t.free("router", "rows", "inner_rows")

    def backward(self, *, after: str) -> None:
        """From the gradient of what is added to that of the normed stream; rows alone are made of `after`.

        It may be left where gradients of outputs are on their way, and where those of rows are."""
        t = self.tape
        t.make(dout_rows=self.leaving)
        t.free(after)
        if self.exchanges:
            t.make(dcame=self.came)
            t.leave()
            t.free("dout_rows")
            t.make(dy=self.here)
            t.free("dcame")
        self._gemm(self.here, da=self.activated)
        if not self.in_place:
            t.make(dinner=self.inner, a=self.activated)
        t.pass_through(numbers=self.numbers)
        t.free(*(() if self.in_place else ["inner_rows"]))
        if self.exchanges:  # weight gradients wait for the rows to travel, one at a time
            t.hold_back("dy", "da", "a")
        else:
            t.free("dout_rows", "da", "a")
        self._gemm(self.inner, drows=self.here)
        if self.exchanges:
            t.flush()
            t.hold_back("inner_rows", "dinner", "rows")
            if not self.engines:
                t.make(in_order=self.here)
            t.make(drows_back=self.rows)
            t.flush()
            t.free("drows")
            t.leave()
            t.free("in_order")
        if self.recompute:
            t.make(rows=self.rows)
        t.make(dn2=self.x)
        t.free("inner_rows", "dinner", "rows", "drows", "drows_back", "router", "plan")

    def _gemm(self, size: int, **out: int) -> None:
        """Of rows of so many bytes, of which FP8 has a copy of a byte for each number while they are multiplied."""
        if self.scales is not None:
            self.tape.make(quantized_rows=size // self.item + self.scales)
        self.tape.make(**out)
        self.tape.free("quantized_rows")
