"""What products of FP8 would save of a step, and what making the numbers costs. Needs a GPU; a minute.

    python -m benchmarks.fp8                    # shape D2, held against a bf16 step of 771 ms
    python -m benchmarks.fp8 --shape D1 --step 297 --out fp8.json

Prints milliseconds of each product in bf16 and in fp8 with one scale for a tensor or one for each row; of the passes
that make fp8 copies, by `torch.compile` and by the Triton kernels of `stretto.kernels`; and what each recipe
adds up to over a step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.train.measure import sustained
from benchmarks.train.shapes import SHAPES, Shape
from stretto.kernels import fp8 as kernels
from stretto.tensor_parallel import fp8
from stretto.tensor_parallel.fp8 import E4M3, E5M2

Times = dict[str, float]


class Bench(NamedTuple):
    device: torch.device
    seconds: float

    def ms(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call; NaN, and the reason printed, of what this device does not do."""
        try:
            return sustained(run, self.device, seconds=self.seconds)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"    cannot: {str(error).splitlines()[0][:160]}")
            return float("nan")

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device)


def products(n: int, d_in: int, d_out: int, bench: Bench) -> Times:
    """Forward, input gradient and weight gradient of one matrix, over n tokens."""
    x, dy, w = bench.random(n, d_in), bench.random(n, d_out), bench.random(d_out, d_in)
    total = torch.zeros(d_out, d_in, device=bench.device)
    part = bench.random(d_out, d_in)
    wide = torch.zeros_like(total)
    add_in = torch.ops.aten.addmm.dtype_out
    times = {
        "bf16 forward": bench.ms(lambda: x @ w.t()),
        "bf16 input gradient": bench.ms(lambda: dy @ w),
        "bf16 weight gradient, added": bench.ms(lambda: add_in(total, dy.t(), x, torch.float32, out=total)),
        "add bf16 to fp32": bench.ms(lambda: kernels.add_(total, part)),
        "add fp32 to fp32": bench.ms(lambda: total.add_(wide)),
    }
    one = torch.ones(1, 1, device=bench.device)
    x8, x8_t = fp8.quantize_both(x, one, dtype=E4M3)
    w8, w8_t = fp8.quantize_both(w, one, dtype=E4M3)
    for kind in ("tensor", "row"):
        dy8, dy8_t = fp8.quantize_both(dy, one, dtype=E5M2 if kind == "tensor" else E4M3)

        rows = {
            size: one if kind == "tensor" else torch.ones(size, 1, device=bench.device) for size in (n, d_in, d_out)
        }
        for fast in (True, False):

            def product(a: Tensor, b: Tensor, out: torch.dtype, rows: Any = rows, fast: bool = fast) -> Tensor:
                scales = rows[a.shape[0]], rows[b.shape[0]].t()
                return torch._scaled_mm(a, b.t(), *scales, out_dtype=out, use_fast_accum=fast)

            how = f"{kind} {'fast' if fast else 'exact'}"
            times[f"{how} forward"] = bench.ms(partial(product, x8, w8, torch.bfloat16))
            times[f"{how} input gradient"] = bench.ms(partial(product, dy8, w8_t, torch.bfloat16))
            times[f"{how} weight gradient"] = bench.ms(partial(product, dy8_t, x8_t, torch.bfloat16))
            times[f"{how} weight gradient, fp32 out"] = bench.ms(partial(product, dy8_t, x8_t, torch.float32))
    return times


def passes(n: int, d: int, bench: Bench) -> Times:
    """The passes over one matrix [n, d] that make fp8 copies of it."""
    x = bench.random(n, d)
    scale = fp8.scale(x, dtype=E4M3)
    functions = (fp8.scale, fp8.narrow, fp8.quantize_transposed, fp8.quantize_both, fp8.quantize_rows)
    compiled = {f: torch.compile(f, dynamic=False) for f in functions}
    triton = partial(kernels.copies, x, scale, E4M3)
    times = {
        "scale": bench.ms(lambda: compiled[fp8.scale](x, dtype=E4M3)),
        "scale, Triton": bench.ms(lambda: kernels.scale(x, dtype=E4M3)),
        "narrow": bench.ms(lambda: compiled[fp8.narrow](x, scale, dtype=E4M3)),
        "narrow across": bench.ms(lambda: compiled[fp8.quantize_transposed](x, scale, dtype=E4M3)),
        "narrow both": bench.ms(lambda: compiled[fp8.quantize_both](x, scale, dtype=E4M3)),
        "narrow rows": bench.ms(lambda: compiled[fp8.quantize_rows](x)),
        "narrow, Triton": bench.ms(partial(triton, plain=True, turned=False)),
        "narrow across, Triton": bench.ms(partial(triton, plain=False, turned=True)),
        "narrow rows, Triton": bench.ms(lambda: kernels.quantize_rows(x)),
    }
    for tile, warps in (((64, 64), 4), ((64, 128), 4), ((128, 64), 4), ((128, 128), 8)):
        run = partial(triton, plain=True, turned=True, tile=tile, warps=warps)
        times[f"narrow both, Triton {tile[0]}x{tile[1]}"] = bench.ms(run)
    wanted = fp8.quantize_both(x, scale, dtype=E4M3)
    for mine, want in zip(triton(plain=True, turned=True), wanted, strict=True):
        off = (mine.float() != want.float()).float().mean().item()
        print(f"    the Triton copy differs from torch's in {off:.1e} of its elements")
    return times


def recipes(shape: Shape, tables: dict[str, Times], each_pass: dict[int, Times]) -> dict[str, Times]:
    """Milliseconds of a step by recipe: products of the blocks, and the passes around them.

    A pass over a matrix of any width takes what its elements take in the wider of the two that were measured.
    """
    n = shape.micro_batch * shape.seq_len
    microbatches = shape.global_batch // shape.micro_batch
    width = max(each_pass)
    first = 1 / microbatches  # of the microbatches, the first writes where the others add

    def a_pass(name: str, elements: float) -> float:
        options = [ms for key, ms in each_pass[width].items() if key == name or key.startswith(f"{name}, Triton")]
        return min(options) * elements / (n * width)

    def of(copies: str, elements: float) -> float:
        return a_pass("scale", elements) + a_pass(copies, elements)

    totals: dict[str, Times] = {}

    def book(recipe: str, item: str, ms: float) -> None:
        items = totals.setdefault(recipe, {})
        items[item] = items.get(item, 0.0) + ms * shape.layers * microbatches

    for name, (d_in, d_out, _) in shape.matrices.items():
        if name not in tables:
            continue
        t, tokens, weights = tables[name], n * (d_in + d_out), d_in * d_out
        hp = t["bf16 weight gradient, added"]
        book("bf16", "products", t["bf16 forward"] + t["bf16 input gradient"] + hp)
        for fast in ("fast", "exact"):
            back = f"tensor {fast}"
            ahead = t["tensor fast forward"] + t[f"{back} input gradient"]
            for out, add in (("", "add bf16 to fp32"), (", fp32 out", "add fp32 to fp32")):
                recipe = f"tensorwise, {fast} gradients{out}"
                book(recipe, "products", ahead + t[f"{back} weight gradient{out}"])
                book(recipe, "adding", t[add] * (1 - first if out else 1))
                book(recipe, "passes", of("narrow both", tokens + weights * first))
            recipe = f"tensorwise, {fast} gradients, weight gradient in bf16"
            book(recipe, "products", ahead + hp)
            book(recipe, "passes", of("narrow", tokens) + of("narrow both", weights * first))
            recipe = f"rowwise, {fast} gradients, weight gradient in bf16"
            book(recipe, "products", t["row fast forward"] + t[f"row {fast} input gradient"] + hp)
            book(recipe, "passes", a_pass("narrow rows", tokens) + of("narrow both", weights * first))
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="D2")
    parser.add_argument("--step", type=float, default=771.0, help="milliseconds of the bf16 step to hold against")
    parser.add_argument("--seconds", type=float, default=0.12, help="how long each measurement takes, after half of it")
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.fp8 needs a GPU\n")
    bench, shape = Bench(torch.device("cuda"), asked.seconds), SHAPES[asked.shape]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape.name}")
    n = shape.micro_batch * shape.seq_len
    tables = {}
    for name, (d_in, d_out, times) in shape.matrices.items():
        if times < shape.layers:
            continue  # the head stays in bf16
        print(f"  {name}: {n} tokens, {d_in} -> {d_out}")
        tables[name] = products(n, d_in, d_out, bench)
        flops = 2e-9 * n * d_in * d_out
        for what, ms in tables[name].items():
            rate = "" if what.startswith("add ") else f"  {flops / ms:6.0f} TFLOP/s"
            print(f"    {what:44}{ms:8.3f} ms{rate}")
    each_pass = {}
    for d in sorted({shape.hidden, shape.gated * shape.ffn}):
        print(f"  passes over [{n}, {d}]")
        each_pass[d] = passes(n, d, bench)
        for what, ms in each_pass[d].items():
            print(f"    {what:44}{ms:8.3f} ms  {n * d / ms * 1e-9:6.2f} T elements/s")
    totals = recipes(shape, tables, each_pass)
    bf16 = sum(totals["bf16"].values())
    print(f"  a step of {asked.step:.0f} ms, of which {bf16:.0f} are the blocks' products in bf16, would take")
    for recipe, items in totals.items():
        step = asked.step - bf16 + sum(items.values())
        told = ", ".join(f"{item} {ms:.0f}" for item, ms in items.items())
        print(f"    {recipe:56}{step:6.0f} ms, {asked.step / step:.2f}x   ({told})")
    if asked.out:
        found: dict[str, Any] = {"products": tables, "passes": each_pass, "step": totals}
        asked.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
