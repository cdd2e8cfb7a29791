"""Linear layers and norms on tensor-parallel ranks.

Activations are [s, b, h]: sequence first, so that gathering and scattering the sequence touches contiguous memory.
Under sequence parallelism they are [s/t, b, h] outside the pair column -> row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn

from stretto.arguments.sections import A, B
from stretto.autograd import Region, Value
from stretto.params import Init, ParamSpec, Shard, declare
from stretto.structure import Structure
from stretto.tensor_parallel import lora
from stretto.tensor_parallel.build import Build
from stretto.tensor_parallel.formulas import SHIFT
from stretto.tensor_parallel.linear import Gemm, linear, record_linear, record_made
from stretto.tensor_parallel.pointwise import Lazy, Pointwise
from stretto.tensor_parallel.sliced_gemms import SlicedRows

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Projection:
    """One of several matrices that are stored and multiplied as one.

    `copies` consecutive ranks hold the same rows: key and value heads when there are fewer of them than ranks.
    `unit` rows are never cut: those of a head.
    """

    name: str
    d_out: int
    copies: int = 1
    unit: int = 1


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with W [d_out, d_in] cut along d_out: [s(/t), b, d_in] -> [s, b, d_out/t].

    `parts` are the matrices stacked into W; a number stands for a single one of that many rows. What is `inside` the
    tensor-parallel region already, [s, b, d_in], crosses no border. `place` names what of the model they are in.
    """

    def __init__(
        self,
        d_in: int,
        parts: int | Sequence[Projection],
        build: Build,
        *,
        bias: bool,
        init: Init,
        place: str = "",
        inside: bool = False,
    ) -> None:
        super().__init__()
        self.build = build.alone if inside else build
        parts = [Projection("", parts)] if isinstance(parts, int) else parts
        weights = [_cut_rows(p, (p.d_out, d_in), init, weight_decay=True) for p in parts]
        biases = [_cut_rows(p, (p.d_out,), Init(), weight_decay=False) for p in parts]
        self.weight = declare_on(self, "weight", weights, build)
        self.bias = declare_on(self, "bias", biases, build) if bias else None
        if build.exact is not None:
            stored = [w.block({"tp": build.tp}).stored[0] for w in weights]
            stack = [(n, n // p.unit) for n, p in zip(stored, parts, strict=True)]
            self.build = replace(self.build, gemms=build.exact.columns(stack))
        self.adapters: lora.Columns | None = None
        if build.lora is not None and build.lora.targets & {p.name for p in parts}:
            first, second = lora.specs_of_columns(build.lora, d_in, parts)
            self.lora_A = declare_on(self, A, first, build)
            self.lora_B = declare_on(self, B, second, build)
            rows = (w.block({"tp": build.tp}).stored[0] for w in weights)
            adapted = (p.name in build.lora.targets for p in parts)
            drops = (
                lora.Drop(build.lora, f"{place}.{p.name}", build.seed) for p in parts if p.name in build.lora.targets
            )
            self.adapters = lora.Columns(build.lora, build, tuple(zip(rows, adapted, strict=True)), tuple(drops))
        expect_gemms(self.weight, self.build)

    def forward(self, x: Tensor | Lazy, structure: Structure | None = None) -> Tensor:
        """`structure` says where the tokens stand, for what falls away of the input of adapters."""
        if self.adapters is not None:
            return lora.column(x, self.weight, self.bias, self.adapters, self.lora_A, self.lora_B, structure)
        return linear(x, self.weight, self.bias, self.build, column=True)

    def record(self, region: Region, x: Value) -> Value:
        """The same in a region, without adapters."""
        return record_linear(region, Gemm(self.weight, self.build, column=True), self.bias, x)

    def record_made(self, region: Region, made_by: Pointwise, *inputs: Value) -> tuple[Value, Value]:
        """Of an input that is made for it; and the first of what that is made of."""
        return record_made(region, made_by, Gemm(self.weight, self.build, column=True), self.bias, *inputs)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with W [d_out, d_in] cut along d_in: [s, b, d_in/t] -> [s(/t), b, d_out].

    The bias is added once, after the sum. `name` is that of the matrix, by which adapters find it, `place` what of the
    model it is in.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        build: Build,
        *,
        bias: bool,
        init: Init,
        name: str = "",
        place: str = "",
    ) -> None:
        super().__init__()
        self.build = build
        self.shift: Pointwise | None = None
        if build.exact is not None:
            self.build = replace(build, gemms=SlicedRows(build.exact.here))
            self.shift = replace(Pointwise.of(build.exact.by_tokens(SHIFT), build), recompute=False)
        self.weight = declare_on(self, "weight", ParamSpec((d_out, d_in), init, shard=(Shard("tp", 1),)), build)
        once = replicated((d_out,), Init(), sequence_parallel=build.sequence_parallel)
        self.bias = declare_on(self, "bias", once, build) if bias else None
        self.lora = build.lora if build.lora is not None and name in build.lora.targets else None
        if self.lora is not None:
            first, second = lora.specs_of_rows(self.lora, d_in, d_out)
            begin = build.tp.rank * (d_in // build.tp.size)
            self.drop = lora.Drop(self.lora, f"{place}.{name}", build.seed, begin)
            self.lora_A, self.lora_B = declare_on(self, A, first, build), declare_on(self, B, second, build)
        expect_gemms(self.weight, self.build)

    def forward(self, x: Tensor | Lazy, structure: Structure | None = None) -> Tensor:
        """`structure` says where the tokens stand, for what falls away of the input of an adapter."""
        if self.lora is not None:
            y = lora.row(x, self.weight, self.lora, self.build, self.lora_A, self.lora_B, self.drop, structure)
        else:
            y = linear(x, self.weight, None, self.build, column=False)
        if self.bias is None:
            return y
        return y + self.bias if self.shift is None else self.shift.now(y, self.bias)

    def record(self, region: Region, x: Value) -> Value:
        """The same in a region, without adapters and bias."""
        return record_linear(region, Gemm(self.weight, self.build, column=False), None, x)

    def record_made(self, region: Region, made_by: Pointwise, *inputs: Value) -> tuple[Value, Value]:
        """Of an input that is made for it; and the first of what that is made of."""
        return record_made(region, made_by, Gemm(self.weight, self.build, column=False), None, *inputs)


def declare_on(module: nn.Module, name: str, specs: ParamSpec | Sequence[ParamSpec], build: Build) -> nn.Parameter:
    """`stretto.params.declare` with the axis, dtype and device of a build, and memory if the build gives any."""
    param = declare(module, name, specs, axes=[build.tp], dtype=build.dtype, device=build.device)
    if not build.allocate:
        param.untyped_storage().resize_(0)
    return param


def expect(weight: nn.Parameter, build: Build) -> None:
    """Announce that a place of the model adds the gradient of `weight` up itself, if the build has where."""
    if build.accumulators is not None:
        for _ in range(build.uses):
            build.accumulators.expect(weight)


def expect_gemms(weight: nn.Parameter, build: Build) -> None:
    """The same of a place that reads `weight` by the GEMMs of the build alone."""
    expect(weight, build)
    if build.gemms is not None:
        build.gemms.expect(weight)


def replicated(
    shape: tuple[int, ...], init: Init, *, sequence_parallel: bool, weight_decay: bool = False, part: str = ""
) -> ParamSpec:
    """The spec of a parameter that every tensor-parallel rank holds whole.

    Under sequence parallelism each rank applies it to its part of the sequence only, so its gradient is a part.
    """
    return ParamSpec(shape, init, sum_grad=("tp",) if sequence_parallel else (), weight_decay=weight_decay, part=part)


def declare_norm(norm: M, *, sequence_parallel: bool) -> M:
    """Declare the weight (ones) and bias (zeros) of a torch norm that every tensor-parallel rank applies."""
    for name, param in norm.named_parameters(recurse=False):
        init = Init(mean=1.0 if name == "weight" else 0.0)
        declare(norm, name, replicated(tuple(param.shape), init, sequence_parallel=sequence_parallel))
    return norm


def _cut_rows(part: Projection, shape: tuple[int, ...], init: Init, *, weight_decay: bool) -> ParamSpec:
    return ParamSpec(
        shape,
        init,
        shard=(Shard("tp", 0, copies=part.copies),),
        sum_grad=("tp",) if part.copies > 1 else (),
        weight_decay=weight_decay,
        part=part.name,
    )
