"""A dense block as two nodes of autograd, one before its attention and one behind it.

As operations of their own it has eighteen nodes and calls nine modules, and costs the host more than the launches of a
small model. A region does what `Block.run` does, function by function and to the same bits; a block with anything in it
that is not here goes there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from stretto.autograd import Region, Value
from stretto.models.attention import Attention
from stretto.models.feed_forward import FeedForward
from stretto.models.norm import HeadNorm, Norm
from stretto.models.rope import Rotation
from stretto.structure import Structure
from stretto.tensor_parallel import Build, ColumnParallelLinear, RowParallelLinear

Norms = tuple[Norm | None, Norm | None]
"""Before a sublayer, and behind it."""
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BlockRegions:
    """Of `attention`, where a block has it, and of what is behind it. `inside` are all modules of the block."""

    def __init__(
        self, before: Region | None, behind: Region, attention: Attention | None, inside: Iterable[nn.Module]
    ) -> None:
        self._before, self._behind, self._attention = before, behind, attention
        self._hooks = [getattr(module, hooks) for module in inside for hooks in _HOOKS]

    def take(self, x: Tensor) -> bool:
        """Whether they compute the block of x: gradients are wanted, and nobody looks at what is inside, nor, as a
        checkpoint does, at what is saved."""
        if not (x.requires_grad and torch.is_grad_enabled()) or any(self._hooks):
            return False
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is None

    def __call__(self, x: Tensor, rotation: Rotation | None, structure: Structure) -> Tensor:
        """As `Block.forward`."""
        if (attention := self._attention) is None or self._before is None:
            return self._behind(x)  # type: ignore[no-any-return]
        q, k, v, *past = self._before(x, *rotation or ())
        y = attention.attend(q, k, v, attention.scores, structure, attention.sinks)
        del q, k, v  # attention may have kept others
        return self._behind(y, past[0] if past else x)  # type: ignore[no-any-return]


def regions_of(
    attention: nn.Module | None, mlp: nn.Module | None, norms: Sequence[Norms], build: Build, *, rotates: bool
) -> BlockRegions | None:
    """Of a block's sublayers, each beside a residual, as far as they are on this stage; None where they are more than
    norms, GEMMs that add up their weights' gradients, rotary embedding, attention and an activation, of which norms
    and activation may be recomputed."""
    if build.accumulators is None or build.uses > 1:
        return None
    if not (attention is None or (isinstance(attention, Attention) and _plain_attention(attention, rotates))):
        return None
    if not (mlp is None or (isinstance(mlp, FeedForward) and _plain_mlp(mlp))):
        return None
    parts = [each for each in (attention, mlp, *norms[0], *norms[1]) if each is not None]
    inside = [module for each in parts for module in each.modules()]
    before, x, add = None, 0, build.accumulators.add
    if attention is None:
        region = Region(1, add)
    else:
        before = _before(attention, norms[0][0], Region(3 if rotates else 1, add))
        region = Region(2, add)  # of what attention gives, and the stream
        (y,) = region.add_linear(_joined, partial(_joined_back, attention.heads), 0)
        x = _added(region, 1, attention.o_proj.record(region, y), norms[0][1])
    if mlp is not None:
        past, inner = _column(region, mlp.gate_up_proj, x, norms[1][0])
        if mlp.activation.recompute:
            y, _ = mlp.down_proj.record_made(region, mlp.activation, inner)
        else:
            y = mlp.down_proj.record(region, mlp.activation.record(region, inner)[0])
        x = _added(region, past, y, norms[1][1])
    return BlockRegions(before, region.close(x), attention, inside)


def _plain_attention(attention: Attention, rotates: bool) -> bool:
    if attention.clip is not None or attention.parts & {"attention", "projections"}:
        return False
    if not (_direct(attention.qkv_proj) and _direct(attention.o_proj)):
        return False
    if attention.q_norm is None:
        return True
    return rotates and isinstance(attention.q_norm, HeadNorm) and attention.norm_and_rotate is not None


def _plain_mlp(mlp: FeedForward) -> bool:
    return mlp.chunks == 1 and "projections" not in mlp.parts and _direct(mlp.gate_up_proj) and _direct(mlp.down_proj)


def _direct(layer: ColumnParallelLinear | RowParallelLinear) -> bool:
    """Whether it is one GEMM that adds its weight's gradient up itself."""
    if isinstance(layer, ColumnParallelLinear):
        return layer.adapters is None
    return layer.lora is None and layer.bias is None


def _before(attention: Attention, norm: Norm | None, region: Region) -> Region:
    """From the stream, cos and sin to q, k and v [b, heads, s, d], and past them where there is a norm."""
    heads, kv_heads, angles = attention.heads, attention.kv_heads, range(1, region.inputs)
    past, qkv = _column(region, attention.qkv_proj, 0, norm)
    (qkv,) = region.add_linear(partial(_heads, attention.dim), _heads_back, qkv)
    if isinstance(attention.q_norm, HeadNorm) and isinstance(attention.k_norm, HeadNorm):
        assert attention.norm_and_rotate is not None
        weights = [region.parameter(each.weight) for each in (attention.q_norm, attention.k_norm)]
        found = attention.norm_and_rotate.record(region, qkv, *weights, *angles, heads=heads)
    elif angles:
        found = attention.rotate.record(region, qkv, *angles, sizes=(heads, kv_heads), rest=kv_heads)
    else:
        found = region.add_linear(partial(_split, [heads, kv_heads, kv_heads]), _split_back, qkv, writes=3)
    found = region.add_linear(_apart, _apart_back, *found, writes=3)
    return region.close(*found, *(() if norm is None else (past,)))


def _column(region: Region, layer: ColumnParallelLinear, x: Value, norm: Norm | None) -> tuple[Value, Value]:
    """What goes past, and the first GEMM of a sublayer, with the norm before it."""
    if norm is None:
        return x, layer.record(region, x)
    if norm.op.recompute:
        y, past = layer.record_made(region, norm.op, *norm.inputs(region, x))
        return past, y
    normed, past = norm.record(region, x)
    return past, layer.record(region, normed)


def _added(region: Region, past: Value, x: Value, norm: Norm | None) -> Value:
    """The stream, with what a sublayer adds to it."""
    if norm is not None:
        x, _ = norm.record(region, x)
    (out,) = region.add_linear(torch.add, _both, past, x)
    return out


def _both(dy: Tensor) -> tuple[Tensor, ...]:
    return dy, dy


def _heads(dim: int, x: Tensor) -> Tensor:
    """[s, b, heads * d] -> [s, b, heads, d]."""
    return x.view(*x.shape[:2], -1, dim)


def _heads_back(dy: Tensor) -> tuple[Tensor, ...]:
    return (dy.flatten(2),)


def _split(sizes: list[int], x: Tensor) -> tuple[Tensor, ...]:
    """Heads of queries, keys and values."""
    return tuple(x.split_with_sizes(sizes, 2))


def _split_back(*gradients: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat(gradients, 2),)


def _apart(*x: Tensor) -> tuple[Tensor, ...]:
    """[s, b, heads, d] -> [b, heads, s, d], as attention takes it."""
    return tuple([each.permute(1, 2, 0, 3) for each in x])


def _apart_back(*gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple([each.permute(2, 0, 1, 3) for each in gradients])


def _joined(y: Tensor) -> Tensor:
    """[b, heads, s, d] -> [s, b, heads * d]."""
    return y.permute(2, 0, 1, 3).flatten(2)


def _joined_back(heads: int, dy: Tensor) -> tuple[Tensor, ...]:
    return (dy.view(*dy.shape[:2], heads, -1).permute(1, 2, 0, 3),)
