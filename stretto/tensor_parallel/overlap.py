"""GEMMs of the forward whose communication overlaps a part of them, where a peer buffer carries it.

A product that gathers begins with the rows that this rank has; one that scatters begins with those of the other ranks.
Each row is what it would be: only the order is another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stretto.collectives import all_gather_async, reduce_scatter_rows_async
from stretto.tensor_parallel.build import Build
from stretto.world import Axis


def overlaps(x: Tensor, build: Build, *, column: bool, d_out: int) -> bool:
    """Whether the collective of a GEMM of x [s(/t), b, d_in] goes through a peer buffer, and the GEMM is plain."""
    peer_buffer = build.tp.peer_buffer
    if peer_buffer is None or build.gemms is not None or not build.sequence_parallel:
        return False
    if column:
        return peer_buffer.takes(x.nbytes)
    return x.shape[0] % build.tp.size == 0 and peer_buffer.takes(x[..., 0].nbytes * d_out // build.tp.size)


def gathered(x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis) -> tuple[Tensor, Tensor]:
    """y [s, b, d_out] = x W^T + b of all ranks' x [s/t, b, d_in], and all x [s, b, d_in]."""
    n = x.shape[0]
    coming = all_gather_async(x, tp)
    y = x.new_empty((tp.size * n, *x.shape[1:-1], weight.shape[0]))
    begin, end = tp.rank * n, (tp.rank + 1) * n
    _multiply(x, weight, bias, y[begin:end])
    whole = coming.wait()
    for rows in (slice(0, begin), slice(end, None)):
        if y[rows].numel():
            _multiply(whole[rows], weight, bias, y[rows])
    return y, whole


def scattered(x: Tensor, weight: Tensor, tp: Axis) -> Tensor:
    """This rank's rows [s/t, b, d_out] of the sum over the ranks of x W^T, x [s, b, d_in]."""
    parts = x.chunk(tp.size)

    def rows(to: int, out: Tensor | None) -> Tensor:
        if out is None:
            return F.linear(parts[to], weight)
        return _multiply(parts[to], weight, None, out)

    like = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="meta")
    return reduce_scatter_rows_async(rows, like, tp).wait()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out [.., d_out] = x W^T + b."""
    rows, into = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=into)
    else:
        torch.addmm(bias, rows, weight.t(), out=into)
    return out
