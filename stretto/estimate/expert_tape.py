"""The tensors of a layer of experts, forward and back, where experts have equal loads.

As `stretto.experts` has it: the rows of all assignments exist as often as they are put in order or sent back, those of
this rank's own tokens (`own_rows`) apart from those of all others'.
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
    """Of tokens `leaving` bytes go, `came` arrive; `here` are the rows of this rank's experts, as many as come back. Of
    these `inner` bytes enter the activation, and `own` of them are of this rank's own tokens."""

    tape: Tape
    x: int
    """Of the tokens themselves."""
    router: int
    """What the router keeps."""
    plan: int
    """Where rows go and come from: kept also by a block that is recomputed."""
    leaving: int
    came: int
    numbers: int
    """A weight of each row, and its gradient; where they travel, also in the other order, and where that is."""
    here: int
    inner: int
    activated: int
    own: float
    exchanges: bool
    engines: bool
    """Whether tokens, and rows that go back, are put in order where others read them."""
    ordered: bool
    """Whether rows that go back are put in order before they leave: of several other ranks', and without engines."""
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
        engines = message_over_ep(args) is not None
        return cls(
            tape,
            x=item * share * m.hidden,
            router=router_bytes(args),
            plan=plan_bytes(args),
            leaving=item * m.hidden * (share * most_crossing(args) if exchanges else rows),
            came=int(item * m.hidden * share * crossing(args)),
            numbers=rows * ((4 * max(4, item) + 8) if exchanges else 3 * max(4, item)),
            here=item * rows * p.etp * m.hidden,
            inner=item * rows * m.dim_expert * (2 if m.gated else 1),
            activated=item * rows * m.dim_expert,
            own=1 / (p.ep * p.etp),
            exchanges=exchanges,
            engines=engines,
            ordered=not engines and p.ep * p.etp > 2,
            recompute=selective and not exchanges,
            in_place=m.activation == "swiglu",
            item=item,
            scales=None if args.run.fp8 == "none" else 4 * rows * p.etp,
        )

    def forward(self, *, keep: bool) -> None:
        """From n2 to what is added; it may be left at each `Stop` of `stretto.experts.run`."""
        t, others = self.tape, 1 - self.own
        t.make(router=self.router, plan=self.plan)
        if self.exchanges:
            t.make(leaving=0 if self.engines else self.leaving)
            t.leave()
            t.leave()  # what ranks ask each other is small
        t.make(own_rows=self._of(self.here, self.own))
        if self.exchanges:
            t.make(came=self.came)
            t.leave()
        self._gemm(self.own, self.here, own_inner=self.inner)
        if self.recompute:
            t.free("own_rows")
        if self.exchanges:
            t.free("leaving")  # as they left: a message holds them until it is waited for
            t.make(rows=self._of(self.here, others))
            t.free("came")
            self._gemm(others, self.here, inner_rows=self.inner)
            t.make(activated_rows=self._of(self.activated, others))
            self._gemm(others, self.activated, out_rows=self.here)
            if self.ordered:
                t.make(back_in_order=self._of(self.here, others))
                t.free("out_rows")
            t.free("activated_rows")
            t.leave()
            t.make(back=self._of(self.here, others))
        t.make(own_activated=self._of(self.activated, self.own))
        self._gemm(self.own, self.activated, own_out=self.here)
        t.free("own_activated")
        if self.exchanges:
            t.leave()
            t.free("back_in_order", "out_rows")
        t.make(more=self.x)
        t.free("own_out", "back")
        if not keep:
            t.free("router", "own_rows", "own_inner", "rows", "inner_rows")

    def backward(self, *, after: str) -> None:
        """From the gradient of what is added to that of the normed stream; rows alone are made of `after`.

        It may be left where gradients of outputs are on their way, when this rank's own are through the last matrix,
        and where those of rows are on their way, before and behind the weight gradients."""
        t, others = self.tape, 1 - self.own
        if self.exchanges:
            t.make(dout_rows=0 if self.engines else self.leaving)
            t.make(dcame=self.came)
        t.make(own_dy=self._of(self.here, self.own))
        t.free(after)
        if self.exchanges:
            t.leave()
        self._into_activation("own_", self.own)
        if self.exchanges:
            t.leave()
            t.free("dout_rows")
            t.make(dy=self._of(self.here, others))
            t.free("dcame")
            self._into_activation("", others)
            self._gemm(others, self.inner, drows=self.here)
            # Weight gradients wait for the rows to travel, one at a time, and those of other parts for this rank's own.
            if self.ordered:
                t.make(in_order=self._of(self.here, others))
            t.make(drows_back=self._of(self.here, others))
            t.free("dy", "da", "a", "own_dy", "own_da", "own_a")
            t.free("drows")
        else:
            t.free("own_dy", "own_da", "own_a")
        self._gemm(self.own, self.inner, own_drows=self.here)
        if self.recompute:
            t.make(own_rows=self.here)
        if self.exchanges:
            t.leave()
            t.free("inner_rows", "dinner", "rows", "own_inner", "own_dinner", "own_rows")
            t.leave()
            t.free("in_order")
        t.free("own_inner", "own_dinner", "own_rows", "router")
        t.make(drouter=self.x)
        t.make(dn2=self.x)
        t.free("own_drows", "drows_back", "drouter", "plan")

    def _into_activation(self, of: str, share: float) -> None:
        """Back through the last matrix and the activation of a part's rows."""
        t = self.tape
        self._gemm(share, self.here, **{f"{of}da": self.activated})
        if not self.in_place:
            t.make(**{f"{of}dinner": self._of(self.inner, share), f"{of}a": self._of(self.activated, share)})
        t.pass_through(numbers=self._of(self.numbers, share))
        t.free(*(() if self.in_place else [f"{of}inner" if of else "inner_rows"]))

    def _of(self, size: int, share: float) -> int:
        return int(size * share)

    def _gemm(self, share: float, size: int, **out: int) -> None:
        """Of a share of rows of so many bytes, of which FP8 has a copy of a byte for each number while they are
        multiplied."""
        if self.scales is not None:
            self.tape.make(quantized_rows=self._of(size // self.item + self.scales, share))
        self.tape.make(**{name: self._of(size, share) for name, size in out.items()})
        self.tape.free("quantized_rows")
