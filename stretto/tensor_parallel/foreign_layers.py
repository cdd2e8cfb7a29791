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
    several ranks hold the same where there are fewer units than ranks. Without units padding makes rows divide.
    Of `sections`, numbers of rows that its forward splits them into (queries, keys, values), each is cut by itself."""

    units: int | None = None
    copied: bool = False
    border: Border = "whole"
    sections: tuple[int, ...] = ()


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
    part of the sequence, their gradient is a part of the sum (`partial`). With `gathers` what comes out of such a
    module is given on whole: of the last norm, say, in front of what looks at single tokens."""

    partial: bool = False
    gathers: bool = False


@dataclass(frozen=True)
class Experts:
    """A module of stacked experts as transformers has them, called with (x [n, h], experts [n, k], weights [n, k]):
    `gate_up_proj` [E, 2 f, h] and `down_proj` [E, h, f], of which each rank has a part of the f of every expert."""


@dataclass(frozen=True)
class Around:
    """A module of others: called with all of the sequence it `takes` this rank's part, or called with that, the whole.

    What takes "and gives" the whole computes the same of it on every rank (a router must see all tokens), and gives
    this rank's part on. `attributes` are set on it: numbers of heads, say, which its forward reads.
    """

    takes: Literal["as it comes", "part", "whole", "and gives"] = "as it comes"
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


Style = Colwise | Rowwise | Vocab | Replicated | Around | Experts


def is_conv1d(part: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in transformers, whose weight is [d_in, d_out]."""
    return type(part).__name__ == "Conv1D" and type(part).__module__ == "transformers.pytorch_utils"


def is_scaled(part: nn.Module) -> bool:
    """Whether it is one of the embeddings in transformers that multiply by `embed_scale`, and do nothing else."""
    return isinstance(part, nn.Embedding) and type(part).__name__.endswith("ScaledWordEmbedding")


def take_over(part: nn.Module, style: Style, axis: Axis) -> None:
    """Let the module compute as its style says: a hook for what goes in, or a class of its own for what it is."""
    cut = ("in_features", "nx") if isinstance(style, Rowwise) else ("num_embeddings", "out_features")
    part.__dict__["_cut_over"] = _Over(style, axis, next((n for name in cut if (n := getattr(part, name, 0))), 0))
    if isinstance(style, Around):
        for name, value in style.attributes.items():
            setattr(part, name, value)
        if style.takes != "as it comes":
            part.register_forward_pre_hook(_border_hook, with_kwargs=True)
        if style.takes == "and gives":
            part.register_forward_hook(_given_hook)
    elif isinstance(style, Colwise):
        part.__class__ = _ColwiseConv1D if is_conv1d(part) else _ColwiseLinear
    elif isinstance(style, Rowwise):
        part.__class__ = _RowwiseConv1D if is_conv1d(part) else _RowwiseLinear
    elif isinstance(style, Vocab):
        embedding = _ScaledVocabEmbedding if is_scaled(part) else _VocabEmbedding
        part.__class__ = embedding if isinstance(part, nn.Embedding) else _VocabLinear
    elif isinstance(style, Experts):
        part.register_forward_pre_hook(_experts_hook)
        part.register_forward_hook(_summed_hook)
    elif style.gathers:
        part.register_forward_hook(_gathered_hook)


@dataclass(frozen=True)
class _Over:
    style: Style
    axis: Axis
    size: int
    """What is cut, without padding."""


class _ColwiseLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        return F.linear(_entered(input, over), self.weight, self.bias)


class _RowwiseLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        return _rowwise(input, self.weight, self._parameters["bias"], over)


class _ColwiseConv1D(nn.Module):
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        return F.linear(_entered(x, over), self.weight.t(), self.bias)


class _RowwiseConv1D(nn.Module):
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        return _rowwise(x, self.weight.t(), self._parameters["bias"], over)


def _rowwise(x: Tensor, weight: Tensor, bias: Tensor | None, over: _Over) -> Tensor:
    _, features = _valid(over, weight.shape[1])
    if features < weight.shape[1]:  # an activation may make something of features of padding: exp(0), sigmoid(0)
        x, weight = x[..., :features], weight[:, :features]
    y = _left(F.linear(x, weight), over)
    return y if bias is None else y + bias


class _VocabEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        start, rows = _valid(over, self.weight.shape[0])
        local, mine = localise(input, start, rows)
        pad = self.padding_idx
        here = pad - start if pad is not None and start <= pad < start + rows else None
        return _left(F.embedding(local, self.weight, here) * mine.unsqueeze(-1), over)


class _ScaledVocabEmbedding(_VocabEmbedding):
    embed_scale: Tensor | float

    def forward(self, input: Tensor) -> Tensor:
        scale = self.embed_scale
        return super().forward(input) * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)


class _VocabLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        over: _Over = self.__dict__["_cut_over"]
        logits = F.linear(_entered(input, over), self.weight, self.bias)
        if not cast("Vocab", over.style).gather:
            return logits
        whole: Tensor = _Joined.apply(logits, over.axis, -1)  # type: ignore[no-untyped-call]
        return whole[..., : over.size]  # padding stands at the end


class _Joined(Function):
    """[.., n] -> [.., n * t] for who computes the same of it on every rank: the adjoint takes this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim % x.dim()).contiguous() if axis.size > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank], None, None


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


def _given_hook(part: nn.Module, _args: Any, y: Tensor) -> Tensor:
    return _part(y, part.__dict__["_cut_over"])


def _gathered_hook(part: nn.Module, _args: Any, y: Tensor) -> Tensor:
    over: _Over = part.__dict__["_cut_over"]
    return _whole(y, over.axis)


def _experts_hook(part: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of x and of the weights of its experts each rank's backward has a part of the gradient: its columns' share."""
    over: _Over = part.__dict__["_cut_over"]
    x, experts, weights = args
    return copy_to(x, over.axis), experts, copy_to(weights, over.axis)


def _summed_hook(part: nn.Module, _args: Any, y: Tensor) -> Tensor:
    over: _Over = part.__dict__["_cut_over"]
    return reduce_from(y, over.axis)


def _crossed(x: Tensor, over: _Over) -> Tensor:
    takes = cast("Around", over.style).takes
    if takes == "and gives":
        return cast("Tensor", _Joined.apply(x, over.axis, SEQUENCE))  # type: ignore[no-untyped-call]
    return _whole(x, over.axis) if takes == "whole" else _part(x, over)


def _whole(x: Tensor, axis: Axis) -> Tensor:
    """Contiguous, as the untouched module would have it: some views of others need that."""
    return all_gather(x, axis, SEQUENCE).contiguous()


def _part(x: Tensor, over: _Over) -> Tensor:
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
    return _whole(x, over.axis) if border == "sequence" else copy_to(x, over.axis)


def _left(x: Tensor, over: _Over) -> Tensor:
    border: Border = cast("Any", over.style).border
    if border == "none":
        return x
    return reduce_scatter(x, over.axis, SEQUENCE) if border == "sequence" else reduce_from(x, over.axis)


def _valid(over: _Over, stored: int) -> tuple[int, int]:
    """The first of this rank's words or features, and how many of those that it stores are not padding."""
    start = min(over.axis.rank * stored, over.size)
    return start, min(stored, over.size - start)
