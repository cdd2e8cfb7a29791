"""Which formula has a kernel of its own, and when that is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stretto.context_parallel import merge_
from stretto.distributed import rules
from stretto.experts import grouped as multiplying
from stretto.experts import router as routing
from stretto.experts import rows as moving
from stretto.models import head_norm as norming
from stretto.models import rope as turning
from stretto.tensor_parallel import formulas, loss_formulas
from stretto.tensor_parallel import fp8 as quantizing
from stretto.tensor_parallel import fp8_shards as sharing

Function = Callable[..., Any]


_DTYPES = (torch.bfloat16, torch.float32)
_AFTER_THE_FIRST = (*_DTYPES, torch.int64)
_OF_ROWS = (torch.float32, torch.int64, torch.bool)
"""A number, a place or a mark for each row of the first tensor."""
_OF_EMBEDDING = (*_DTYPES, torch.int64, torch.bool)
_QUANTIZED = (torch.bfloat16,)
"""What is quantized to fp8. From fp32 Triton 3.6 writes a wrong transposed copy beside the plain one on an H200;
nobody asks for it."""


def _any_width(width: int) -> bool:
    return width <= 2**16  # a row is held in registers


def _some(width: int) -> bool:
    return width > 0


def _row(width: int) -> bool:
    return width <= 2**15  # by sixteen warps


def _tiles(width: int) -> bool:
    return width % 128 == 0


def _scores(width: int) -> bool:
    return width <= 2**10  # of one token, in registers


def _power_of_two(width: int) -> bool:
    return 2 <= width <= 2**12 and width & (width - 1) == 0


class Kernel(NamedTuple):
    """`run` takes the arguments of the formula; tensors must have a last dimension that it `fits`, where it is `equal`
    the same, and the first of them one of the `dtypes`. Tensors of indices may have any size, and with `one_fits` all
    but the first."""

    run: Function
    fits: Callable[[int], bool] = _any_width
    dtypes: tuple[torch.dtype, ...] = _DTYPES
    others: tuple[torch.dtype, ...] = _AFTER_THE_FIRST
    """Dtypes of all but the first."""
    equal: bool = False
    one_fits: bool = False

    def takes(self, given: Sequence[Any]) -> bool:
        """Whether all tensors of a call are where and what the kernel can read; it computes in fp32."""
        allowed, looks, first = self.dtypes, True, given[0]
        for x in given:  # at every launch: a loop costs the host less than generators
            if not isinstance(x, Tensor):
                continue
            dtype = x.dtype
            if not x.is_cuda or dtype not in allowed:
                return False
            if looks and dtype is not torch.int64 and not (x.stride(-1) == 1 and self.fits(x.shape[-1])):
                return False
            if self.equal and x.shape[-1] != first.shape[-1]:
                return False
            allowed, looks = self.others, not self.one_fits
        return True


def hand_written(function: Function, otherwise: Function) -> Function:
    """The kernel of a formula where it takes what it is given, else `otherwise`; that alone where there is none.

    Of a `partial` the formula is what is inside; what is bound goes to the kernel, too.
    """
    formula, bound = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    kernel = kernels().get(formula)
    if kernel is None:
        return otherwise

    def choose(*tensors: Any, **named: Any) -> Any:
        if kernel.takes((*tensors, *named.values()) if named else tensors):
            return kernel.run(*tensors, **bound, **named)
        return otherwise(*tensors, **named)

    return choose


def kernels() -> Mapping[Function, Kernel]:
    """Each kernel by its formula. Raises ImportError where there is no Triton."""
    # Triton comes with torch for GPUs, not with torch for CPUs
    from stretto.kernels import (
        adamw,
        counting_sort,
        cross_entropy,
        embedding,
        experts,
        fp8,
        grouped,
        head_norm,
        merge,
        rms_norm,
        rope,
        swiglu,
        top_k,
    )

    return {
        formulas.swiglu_backward: Kernel(swiglu.backward),
        formulas.swiglu_both: Kernel(swiglu.both),
        formulas.swiglu_weighted: Kernel(swiglu.weighted),
        formulas.rms_norm_backward: Kernel(rms_norm.backward),
        formulas.rms_norm_both: Kernel(rms_norm.both),
        formulas.zero_centered_rms_norm_backward: Kernel(partial(rms_norm.backward, centre=1.0)),
        formulas.zero_centered_rms_norm_both: Kernel(partial(rms_norm.both, centre=1.0)),
        formulas.add_rows_: Kernel(embedding.add_rows_, _some, (torch.float32,), _OF_EMBEDDING, one_fits=True),
        loss_formulas.statistics: Kernel(cross_entropy.statistics, _some, others=_OF_ROWS, one_fits=True),
        loss_formulas.gradient_: Kernel(cross_entropy.gradient_, _some, others=_OF_ROWS, one_fits=True),
        merge_: Kernel(merge.merge_, _some),
        rules.adamw: Kernel(adamw.adamw, _some, (torch.float32,), _DTYPES, one_fits=True),
        rules.adamw_weights: Kernel(
            partial(adamw.adamw, stored=adamw.WEIGHTS_ALONE), _some, (torch.float32,), _DTYPES, one_fits=True
        ),
        turning.apply_rotary_: Kernel(rope.apply_rotary_, _power_of_two),
        turning.apply_rotary_backward: Kernel(rope.apply_rotary_backward, _power_of_two),
        norming.norm_and_rotate: Kernel(head_norm.forward, _power_of_two, equal=True),
        norming.norm_and_rotate_backward: Kernel(head_norm.backward, _power_of_two, equal=True),
        multiplying.add_products: Kernel(grouped.add_products, _tiles, (torch.float32,), _QUANTIZED),
        routing.best: Kernel(top_k.best, _scores, (torch.float32,)),
        moving.scatter_rows: Kernel(experts.scatter_rows),
        moving.sum_rows: Kernel(experts.sum_rows),
        moving.combine_rows: Kernel(experts.combine_rows),
        moving.by_expert: Kernel(experts.by_expert, dtypes=(torch.int64,)),
        moving.sort_assignments: Kernel(counting_sort.sort_assignments, dtypes=(torch.int64,)),
        quantizing.add_: Kernel(fp8.add_),
        quantizing.scale: Kernel(fp8.scale),
        quantizing.quantize: Kernel(fp8.quantize, dtypes=_QUANTIZED),
        quantizing.quantize_transposed: Kernel(fp8.quantize_transposed, dtypes=_QUANTIZED),
        quantizing.quantize_both: Kernel(fp8.quantize_both, dtypes=_QUANTIZED),
        quantizing.quantize_rows: Kernel(fp8.quantize_rows, _row),
        sharing.quantize_: Kernel(fp8.quantize_, _some, (quantizing.E4M3,)),
        sharing.transpose_: Kernel(fp8.transpose_, _some, (torch.uint8,), (torch.uint8,)),
    }
