"""Memory of a GPU that holds no tensor of the model's: what libraries work in, and what messages wait in."""

from __future__ import annotations

from typing import Final

from stretto.arguments.schema import Arguments
from stretto.estimate.context import BY_ROWS, every_comm
from stretto.estimate.sizes import BYTES, entering_bytes, local_tokens

CUBLAS: Final = 2**25
"""Bytes that torch gives cuBLAS on Hopper for each thread and stream that multiplies: forwards are launched by one
thread, backwards by autograd's."""
SLOTS: Final = 3
"""Messages of a peer buffer, as `stretto.peer_buffer` has it."""
CHUNK: Final = 2**26
"""Bytes of other ranks' gradients that are added at a time, as `stretto.peer_memory` has it; two are there."""
_UNIT: Final = 2**21
_LARGE: Final = 10 * 2**20
AHEAD: Final = 4
"""Messages to a neighbour that are held until they are known to be over, as `stretto.pipeline_parallel.link` has it:
a host that runs ahead of its GPU fills that."""
PEER_SLOTS: Final = 2
"""Those that wait in memory which a neighbour reads, as `stretto.peer_messages` has it; as many are held beside."""


def workspaces(args: Arguments) -> int:
    """Bytes of a rank on a GPU. Microbatches that are recorded as graphs have workspaces of their own."""
    if args.run.device == "cpu":
        return 0
    return CUBLAS * 2 * (1 + bool(args.run.cuda_graphs)) + _peer_buffers(args) + 2 * CHUNK * adds_by_copy_engines(args)


def tables(args: Arguments) -> int:
    """Bytes of the cosines and sines of all positions, with a window and without."""
    m = args.model
    return 4 * args.batch.seq_len * m.dim_rotary * BYTES[args.run.dtype] * (m.position == "rope")


def rounded(nbytes: int) -> int:
    """What torch's allocator takes for a tensor that stays: a large one has memory of its own in units of 2 MiB, of
    which less than 1 MiB that is left over is for nobody else."""
    left = -nbytes % _UNIT
    return nbytes + left if nbytes >= _LARGE and left <= _UNIT // 2 else nbytes


def adds_by_copy_engines(args: Arguments) -> bool:
    """Whether gradients of other ranks come by copy engines."""
    p = args.parallel
    ranks = (p.dp or 1) * p.cp
    return p.dp_copy_engines and p.mode != "none" and args.run.device != "cpu" and ranks > 1 and _one_host(args, ranks)


def passing(args: Arguments) -> int:
    """Bytes of messages to the neighbours of a pipeline's rank that are not known to be over."""
    p = args.parallel
    if p.pp == 1:
        return 0
    each = args.batch.microbatches(p.dp) * p.num_stages // p.pp
    ahead = AHEAD if message_over_pp(args) is None else PEER_SLOTS
    return min(ahead, each) * _sides(args) * entering_bytes(args)


def _sides(args: Arguments) -> int:
    """Neighbours of a rank: a loop of stages sends to both sides of any rank; of a line the ends have one."""
    return min(2, args.parallel.pp - 1)


def message_over_pp(args: Arguments) -> int | None:
    """Bytes of a message between stages, where copy engines bring it."""
    p = args.parallel
    by_copy_engines = p.pp > 1 and p.pp_copy_engines and args.run.device != "cpu"
    return entering_bytes(args) if by_copy_engines else None


def message_over_tp(args: Arguments) -> int | None:
    """Bytes that a tensor-parallel rank reads of another at a time, where copy engines bring them: its part of
    [s, b, h]."""
    b, p, m = args.batch, args.parallel, args.model
    return b.seq_len * b.micro_batch * m.hidden * BYTES[args.run.dtype] // p.tp if p.tp_comm_overlap else None


def message_over_cp(args: Arguments) -> int | None:
    """Bytes that a context-parallel rank reads of another at a time, where some layer gathers keys and values, all or
    those that it needs, and copy engines bring them."""
    m, p = args.model, args.parallel
    gathers = p.cp > 1 and any(comm in BY_ROWS for comm in every_comm(args))
    if args.run.device == "cpu" or not gathers:
        return None
    return local_tokens(args) * 2 * max(1, m.num_kv_heads // p.tp) * m.dim_per_head * BYTES[args.run.dtype]


def message_over_ep(args: Arguments) -> int | None:
    """Bytes of the rows that a rank sends to experts at a time, where copy engines bring them, over the other ranks; of
    each it may read more or less."""
    m, p = args.model, args.parallel
    ranks = p.ep * p.etp
    if not p.ep_copy_engines or not m.experts or ranks == 1 or args.run.device == "cpu":
        return None
    tokens = -(-local_tokens(args) // p.tp) // (1 + p.ep_comm_overlap)
    return -(-tokens * m.top_k * p.etp * m.hidden * BYTES[args.run.dtype] // (ranks - 1))


def _peer_buffers(args: Arguments) -> int:
    p = args.parallel
    over_tp = (p.tp - 1) * (message_over_tp(args) or 0) * _one_host(args, 1)
    over_cp = (p.cp - 1) * (message_over_cp(args) or 0) * _one_host(args, p.cp)
    near = p.ep * p.etp <= (p.gpus_per_node or p.ep * p.etp)
    over_ep = (p.ep * p.etp - 1) * (message_over_ep(args) or 0) * near
    over_pp = _sides(args) * (message_over_pp(args) or 0) * _one_host(args, p.cp * (p.dp or 1) * 2)
    return SLOTS * (over_tp + over_cp + over_ep) + PEER_SLOTS * over_pp


def _one_host(args: Arguments, ranks: int) -> bool:
    """Whether so many ranks, beside those of tp, are of one host."""
    p = args.parallel
    return ranks * p.tp <= (p.gpus_per_node or ranks * p.tp)
