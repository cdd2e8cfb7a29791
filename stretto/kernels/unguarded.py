"""The kernels of a function by torch's compiler, called without its guards.

`torch.compile` looks at each call for all that may have changed since it compiled, in Python: 40 microseconds and more,
where a kernel takes five. What these functions compute follows from their arguments alone, so a look at the sizes of
those is enough, and what is compiled is called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

_SIGNATURES: Final = 4
"""Sizes for each of which there is a kernel of its own; one for all sizes is for those that come after."""

Function = Callable[..., Any]


def compiled(function: Function) -> Function:
    """As `torch.compile(function)` computes it: tensors and constants -> a tensor, a tuple of them, or None.

    What records gradients or is traced itself goes to `torch.compile`.
    """
    known: dict[Hashable, Function] = {}
    any_size = torch.compile(function)

    def call(*given: Any, **named: Any) -> Any:
        every = (*given, *named.values())
        tensors = [x for x in every if isinstance(x, Tensor)]
        if _traced(tensors):
            return any_size(*given, **named)
        key = tuple([(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in every]), *named
        kernels = known.get(key)
        if kernels is None:
            if len(known) >= _SIGNATURES:
                return any_size(*given, **named)
            kernels = known[key] = _compile(function, given, named)
        return kernels(*tensors)

    return call


def _traced(tensors: list[Tensor]) -> bool:
    """Whether somebody looks at what is computed with these tensors."""
    return (
        (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        or any(type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.compiler.is_compiling()
    )


def _compile(function: Function, given: tuple[Any, ...], named: dict[str, Any]) -> Function:
    """A function of the tensors among the arguments, with what else is in them bound; its results are a list."""
    from torch._inductor import compile as by_inductor

    places = [n for n, x in enumerate(given) if isinstance(x, Tensor)]
    words = [name for name, x in named.items() if isinstance(x, Tensor)]
    single = False

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal single
        everything, more = list(given), dict(named)
        for n, x in zip(places, tensors, strict=False):
            everything[n] = x
        more.update(zip(words, tensors[len(places) :], strict=True))
        made = function(*everything, **more)
        single = isinstance(made, Tensor)
        return (made,) if single else made or ()

    tensors = [*(given[n] for n in places), *(named[name] for name in words)]
    with torch.no_grad():
        graph = make_fx(of_tensors, tracing_mode="fake")(*tensors)
        kernels = by_inductor(graph, tensors)
    return (lambda *tensors: kernels(*tensors)[0]) if single else kernels
