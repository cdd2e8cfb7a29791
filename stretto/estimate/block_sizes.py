"""Bytes of the tensors of a block, on one rank and for one microbatch."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.schema import Arguments
from stretto.estimate.kept import Parts, latent_elements, reads_twice
from stretto.estimate.sizes import BYTES, local_tokens


@dataclass(frozen=True)
class BlockSizes:
    """By what they are. Where tp cuts the sequence a rank has `x` of the stream, and `whole` after a gather."""

    x: int
    whole: int
    heads: int
    """Queries, keys and values as they leave their GEMMs, and what else of them attention keeps."""
    read_twice: int
    """The normed stream, where one of two matrices that read it keeps it."""
    normed_q: int
    """Queries once more, where they have norms."""
    normed_k: int
    clipped: int
    """Queries, keys and values once more, where they are held within bounds."""
    q: int
    kv: int
    """Keys and values, side by side."""
    attended: int
    lse: int
    scratch: int
    """What a GPU's kernels of attention need in the backward beside tensors: see `_scratch`."""
    inner: int
    activated: int
    item: int
    """Of one number."""
    wide: int
    """Of fp32 or wider, to the dtype of activations."""

    @classmethod
    def of(cls, args: Arguments, inner: int, parts: Parts) -> BlockSizes:
        """Of a block whose dense feed-forward has so many features, and which recomputes `parts`."""
        m, p, item = args.model, args.parallel, BYTES[args.run.dtype]
        tokens = local_tokens(args)
        every, wide = item * tokens, max(4, item)
        q = m.heads * m.dim_per_head // p.tp
        k = (m.heads // p.tp if m.latent else max(1, m.num_kv_heads // p.tp)) * m.dim_per_head
        v = m.heads // p.tp * m.dim_value if m.latent else k
        heads = every * (latent_elements(args, selective="norms" in parts) if m.latent else q + k + v)
        x = every * m.hidden // (p.tp if p.sequence_parallel else 1)
        each = tokens // args.run.ffn_chunks * item * inner // p.tp
        return cls(
            x=x,
            whole=every * m.hidden,
            heads=heads,
            read_twice=x * reads_twice(args, parts),
            normed_q=every * q * m.qk_norm,
            normed_k=every * k * m.qk_norm,
            clipped=every * (q + k + v) * (m.qkv_clip is not None),
            q=every * q,
            kv=every * (k + v),
            attended=every * m.heads * m.dim_value // p.tp,
            lse=tokens * m.heads // p.tp * wide,
            scratch=_scratch(args, q, k) * tokens,
            inner=each * (2 if m.gated else 1),
            activated=each,
            item=item,
            wide=wide // item,
        )


def _scratch(args: Arguments, q: int, k: int) -> int:
    """Bytes for each token, of so many features of queries and of keys on a rank: gradients of queries in fp32 and a
    number for each head; where heads share keys, gradients of keys and values for each of them. So measured of cuDNN's
    kernels and FlashAttention 2's, 64 to 2,048 MiB a unit, within 0.1 %."""
    if args.run.device != "cuda":
        return 0
    return 4 * (q + args.model.heads // args.parallel.tp) + (2 * BYTES[args.run.dtype] * q if k != q else 0)
