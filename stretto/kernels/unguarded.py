"""The kernels of a function by torch's compiler, called without its guards.

`torch.compile` looks at each call for all that may have changed since it compiled, in Python: 40 microseconds and more,
where a kernel takes five. What these functions compute follows from their arguments alone, so a look at the sizes of
those is enough, and what is compiled is called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

_SIGNATURES: Final = 4
"""Sizes for each of which there is a kernel of its own; one for all sizes is for those that come after."""

_LEFT_OUT: Final[Mapping[str, Any]] = MappingProxyType({"size_asserts": False, "graph_partition": False})
"""Of what the compiler makes: sizes were looked at before, and nothing of a function stays outside of its kernels."""
_PLAIN: Final = (Tensor, torch.nn.Parameter)

Function = Callable[..., Any]


def compiled(function: Function) -> Function:
    """As `torch.compile(function)` computes it: tensors and constants -> a tensor, a tuple of them, or None.

    What records gradients or is traced itself goes to `torch.compile`.
    """
    known: dict[Hashable, Function] = {}
    any_size = torch.compile(function)

    def call(*given: Any, **named: Any) -> Any:
        tensors: list[Tensor] = []
        kind: list[Any] = [*named]
        recording = torch.is_grad_enabled()
        traced = torch._C._len_torch_dispatch_stack() > 0 or torch.compiler.is_compiling()
        for x in (*given, *named.values()) if named else given:  # at every call: one loop costs the host least
            if isinstance(x, Tensor):
                tensors.append(x)
                kind += (x.shape, x.stride(), x.dtype, x.device)
                traced = traced or (recording and x.requires_grad) or (type(x) not in _PLAIN)
            else:
                kind.append(x)
        if traced:  # somebody looks at what is computed with these tensors
            return any_size(*given, **named)
        kernels = known.get(key := tuple(kind))
        if kernels is None:
            if len(known) >= _SIGNATURES or not _distinct(tensors):
                return any_size(*(x.detach() if isinstance(x, Tensor) else x for x in given), **named)
            known[key], made = _compile(function, given, named, tensors)
            return made
        return kernels(tensors)

    return call


def _distinct(tensors: list[Tensor]) -> bool:
    """Whether a kernel of these is one of any others: of a tensor that is given twice it would take both arguments for
    one also when they are two, and tensors of `inference_mode` do not tell whether they were written."""
    return len({*map(id, tensors)}) == len(tensors) and not any(x.is_inference() for x in tensors)


def _compile(
    function: Function, given: tuple[Any, ...], named: dict[str, Any], tensors: list[Tensor]
) -> tuple[Function, Any]:
    """A function of a list of the tensors among the arguments, with what else is in them bound; and its results."""
    from torch._functorch import config as functorch
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    tensors = [x.detach() for x in tensors]  # whoever traces asks a tensor for its gradient
    places = [n for n, x in enumerate(given) if isinstance(x, Tensor)]
    words = [name for name, x in named.items() if isinstance(x, Tensor)]
    single = False
    inside: list[tuple[Any, Any]] = []

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal single
        everything, more = list(given), dict(named)
        for n, x in zip(places, tensors, strict=False):
            everything[n] = x
        more.update(zip(words, tensors[len(places) :], strict=True))
        made = function(*everything, **more)
        single = isinstance(made, Tensor)
        return (made,) if single else made or ()

    def noting(graph: Any, *rest: Any, **more: Any) -> Any:
        inside.append((graph, compile_fx_inner(graph, *rest, **more)))
        return inside[-1][1]

    # A cache of what is wrapped would give no kernels; those themselves are in another.
    with torch.no_grad(), functorch.patch(enable_autograd_cache=False):
        graph = make_fx(of_tensors, tracing_mode="fake")(*tensors)
        whole: Any = compile_fx(graph, tensors, inner_compile=noting, config_patches={**_LEFT_OUT})
        versions = [x._version for x in tensors]
        made = whole(*tensors)
    written = versions != [x._version for x in tensors]
    bare = None if written or _alias(tensors, made) else _kernels(inside, len(tensors), len(made))
    kernels = bare or (lambda tensors: whole(*tensors))
    return ((lambda tensors: kernels(tensors)[0]), made[0]) if single else (kernels, made)


def _alias(tensors: list[Tensor], made: list[Tensor]) -> bool:
    """Whether something that was made is a view of what was given, or of something else that was made."""
    held, new = ([x.untyped_storage().data_ptr() for x in each] for each in (tensors, made))
    return len({*new}) < len(new) or not {*held}.isdisjoint(new)


def _kernels(inside: list[tuple[Any, Any]], inputs: int, outputs: int) -> Function | None:
    """What takes a list of so many tensors and makes so many, if that is what was compiled.

    What torch wraps it in takes half of a call's time: it tells autograd of what is written in place and makes views
    of what is given, which is not for what does neither.
    """
    if len(inside) != 1:
        return None
    graph, code = inside[0]
    takes = sum(node.op == "placeholder" for node in graph.graph.nodes)
    [puts] = [node for node in graph.graph.nodes if node.op == "output"]
    found: Function | None = getattr(code, "current_callable", None)
    return found if (takes, len(puts.args[0])) == (inputs, outputs) else None
