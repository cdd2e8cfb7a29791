"""What a layer of an existing module computes once `parallelize` has cut it, and how activations [b, s, h] cross."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from stretto.collectives import all_gather, reduce_scatter
from stretto.tensor_parallel.loss_formulas import localise
from stretto.tensor_parallel.mappings import copy_to, reduce_from
from stretto.world import Axis

SEQUENCE = 1
"""The dimension of the sequence in [b, s, h]."""

Border = Literal["whole", "sequence", "none"]
"""Where a layer's activations enter or leave the region that each rank computes a part of: all of them, parts of the
sequence, or where another module does it."""


@dataclass(frozen=True)
class Colwise:
    """A linear layer cut by its outputs. Its rows are so many `units` (heads) that are not cut apart; with `copied`
    several ranks hold the same where there are fewer units than ranks. Without units padding makes rows divide."""

    units: int | None = None
    copied: bool = False
    border: Border = "whole"


@dataclass(frozen=True)
class Rowwise:
    """A linear layer cut by its inputs, which lie as the outputs of `Colwise` with the same units."""

    units: int | None = None
    border: Border = "whole"


@dataclass(frozen=True)
class Vocab:
    """An embedding, or the linear layer of the logits, cut by words. Unless `gather`, logits stay [b, s, V/t], padded,
    as `vocab_parallel_cross_entropy` takes them."""

    gather: bool = True
    border: Border = "whole"


@dataclass(frozen=True)
class Replicated:
    """Parameters that every rank holds whole. Where each applies them to a part of what there is, its heads or its
    part of the sequence, their gradient is a part of the sum (`partial`)."""

    partial: bool = False


@dataclass(frozen=True)
class Around:
    """A module of others: called with all of the sequence it `takes` this rank's part, or called with that, the whole.

    `attributes` are set on it: numbers of heads, say, which its forward reads.
    """

    takes: Literal["as it comes", "part", "whole"] = "as it comes"
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


Style = Colwise | Rowwise | Vocab | Replicated | Around


def take_over(part: nn.Module, style: Style, axis: Axis) -> None:
    """Let the module compute as its style says: a hook for what goes in, or a class of its own for what it is."""
    part.__dict__["_cut_over"] = _Over(style, axis, getattr(part, "num_embeddings", getattr(part, "out_features", 0)))
    if isinstance(style, Around):
        for name, value in style.attributes.items():
            setattr(part, name, value)
        if style.takes != "as it comes":
            part.register_forward_pre_hook(_border_hook, with_kwargs=True)
    elif isinstance(style, Colwise):
        part.__class__ = _ColwiseLinear
    elif isinstance(style, Rowwise):
        part.__class__ = _RowwiseLinear
    elif isinstance(style, Vocab):
        part.__class__ = _VocabEmbedding if isinstance(part, nn.Embedding) else _VocabLinear


@dataclass(frozen=True)
class _Over:
    style: Style
    axis: Axis
    size: int


class _ColwiseLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        return F.linear(_entered(input, over), self.weight, self.bias)


class _RowwiseLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        y, bias = _left(F.linear(input, self.weight), over), self._parameters["bias"]
        return y if bias is None else y + bias


class _VocabEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        start, rows = _words(over, self.weight)
        local, mine = localise(input, start, rows)
        pad = self.padding_idx
        here = pad - start if pad is not None and start <= pad < start + rows else None
        return _left(F.embedding(local, self.weight, here) * mine.unsqueeze(-1), over)


class _VocabLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        logits = F.linear(_entered(input, over), self.weight, self.bias)
        if not cast("Vocab", over.style).gather:
            return logits
        whole: Tensor = _Joined.apply(logits, over.axis)  # type: ignore[no-untyped-call]
        return whole[..., : over.size]  # padding stands at the end


class _Joined(Function):
    """[.., n] -> [.., n * t] for who computes the same of it on every rank: the adjoint takes this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis, x.dim() - 1) if axis.size > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.chunk(ctx.axis.size, -1)[ctx.axis.rank], None


class _Part(Function):
    """[b, s, h] -> [b, s/t, h] of what every rank has whole: the adjoint joins the parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.chunk(axis.size, SEQUENCE)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_gather(dy, ctx.axis, SEQUENCE), None


def _border_hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The first tensor, or `hidden_states`, cut along the sequence, or gathered."""
    over: _Over = part.__dict__["_cut_over"]
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": _crossed(kwargs["hidden_states"], over)}
    return (_crossed(args[0], over), *args[1:]), kwargs


def _crossed(x: Tensor, over: _Over) -> Tensor:
    if cast("Around", over.style).takes == "whole":
        return all_gather(x, over.axis, SEQUENCE)
    if x.shape[SEQUENCE] % over.axis.size:
        raise ValueError(
            f"a sequence of {x.shape[SEQUENCE]} tokens over {over.axis.name}={over.axis.size} ranks: it must divide "
            "to be cut; pad it, or take a plan without sequence parallelism"
        )
    return x if over.axis.size == 1 else cast("Tensor", _Part.apply(x, over.axis))  # type: ignore[no-untyped-call]


def _entered(x: Tensor, over: _Over) -> Tensor:
    border: Border = cast("Any", over.style).border
    if border == "none":
        return x
    return all_gather(x, over.axis, SEQUENCE) if border == "sequence" else copy_to(x, over.axis)


def _left(x: Tensor, over: _Over) -> Tensor:
    border: Border = cast("Any", over.style).border
    if border == "none":
        return x
    return reduce_scatter(x, over.axis, SEQUENCE) if border == "sequence" else reduce_from(x, over.axis)


def _words(over: _Over, weight: Tensor) -> tuple[int, int]:
    start = min(over.axis.rank * weight.shape[0], over.size)
    return start, min(weight.shape[0], over.size - start)
