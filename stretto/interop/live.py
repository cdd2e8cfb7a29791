"""Named tensors of a run that goes on, whole on every rank, one at a time, from any layout.

    live = Live(built.optimizer.slices(), state.axis("tp", "cp", "dp", "pp"))
    outgoing = Outgoing.of(args)
    for name, tensor in tensors(outgoing.named, outgoing.merged(live)):     # on all ranks alike
        engine.load(name, tensor)                                           # such as one that samples from the policy

Each tensor crosses once: whoever owns a rectangle of it broadcasts that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.exchange import all_gather_json, device_of
from stretto.interop.errors import InteropError
from stretto.interop.names import Shapes
from stretto.params import Slice
from stretto.world import Axis

_PREFIX = "model/"


class Live:
    """The source of logical tensors that the ranks of an axis hold together; every rank asks for the same ones.

    `slices` are those of the optimizer, which has the masters, in fp32 or wider; what is frozen is in its own dtype.
    What they hold is read when it is asked for, so one source serves all steps of a run.
    """

    def __init__(self, slices: Sequence[Slice], axis: Axis) -> None:
        self.axis = axis
        mine = [s for s in slices if s.owner and s.name.startswith(_PREFIX) and s.tensor.numel()]
        said = [
            [s.name.removeprefix(_PREFIX), list(s.offsets), list(s.tensor.shape), str(s.tensor.dtype).split(".")[1]]
            for s in mine
        ]
        self._tensors = {(s.name.removeprefix(_PREFIX), tuple(s.offsets)): s.tensor for s in mine}
        self._held: dict[str, list[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]]] = {}
        for rank, rectangles in enumerate(all_gather_json(said, axis)):
            for name, offsets, shape, dtype in rectangles:
                where = rank, tuple(offsets), tuple(shape), getattr(torch, dtype)
                self._held.setdefault(name, []).append(where)

    @torch.no_grad()
    def __call__(self, wanted: Shapes) -> Mapping[str, Tensor]:
        """The whole tensors of these names, where the ranks' groups take tensors from."""
        return {name: self._whole(name, shape) for name, shape in wanted.items()}

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        held = self._held.get(name, [])
        if sum(torch.Size(each[2]).numel() for each in held) != torch.Size(shape).numel():
            raise InteropError(f"the run does not hold all of {name} {list(shape)}", [])
        whole: Tensor | None = None
        for rank, offsets, size, dtype in held:
            part = self._tensors[name, offsets].contiguous() if rank == self.axis.rank else None
            if self.axis.size > 1:
                device = device_of(self.axis.group)
                part = torch.empty(size, dtype=dtype, device=device) if part is None else part.to(device)
                dist.broadcast(part.view(-1).view(torch.uint8), group=self.axis.group, group_src=rank)
            assert part is not None
            if whole is None:
                whole = torch.empty(shape, dtype=dtype, device=part.device)
            place = whole
            for dim, (first, n) in enumerate(zip(offsets, size, strict=True)):
                place = place.narrow(dim, first, n)
            place.copy_(part)
        assert whole is not None
        return whole
