"""Which kernels of attention make a layer quickest: alone, and between the products of the layer?

    python -m benchmarks.attention [--shapes D1,D2] [--seconds 1.0] [--out FILE.json]

Needs a GPU; flash-attn-4 is measured where it is installed. Alone a kernel has all the power of the chip; in a layer
the products have left it hot, and what counts is what forward and backward of attention add to them. Both are measured
without a pause, after half as long to get warm. Errors are those beside torch's kernels, in the 2-norm.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.train.flops import attention_flops
from benchmarks.train.measure import sustained
from benchmarks.train.shapes import SHAPES, Shape
from stretto.attention.dot_product import Attend, attention_by
from stretto.tensor_parallel.linear import accumulate_matmul

DEVICE = torch.device("cuda")
KERNELS = ("torch", "flash4")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


class Layer:
    """The products of one layer, forward and back, and its attention by any kernels."""

    def __init__(self, shape: Shape) -> None:
        self.shape, tokens = shape, shape.micro_batch * shape.seq_len
        sizes = [(d_in, d_out) for name, (d_in, d_out, _) in shape.matrices.items() if name != "head"]
        self.factors = [(drawn(tokens, i), drawn(tokens, o), drawn(o, i)) for i, o in sizes]
        self.sums = [torch.zeros(o, i, device=DEVICE) for i, o in sizes]
        heads = [shape.heads, shape.kv_heads, shape.kv_heads]
        qkv = drawn(shape.seq_len, shape.micro_batch, sum(heads), shape.head_dim)
        self.qkv = [x.permute(1, 2, 0, 3).detach().requires_grad_() for x in qkv.split(heads, 2)]
        self.dy = torch.randn_like(self.qkv[0])

    def products(self) -> None:
        for (x, dy, w), total in zip(self.factors, self.sums, strict=True):
            torch.mm(x, w.t())
            torch.mm(dy, w)
            accumulate_matmul(total, False, dy, x)

    def forward(self, attend: Attend) -> Tensor:
        return attend(*self.qkv)

    def backward(self, y: Tensor, *, keep: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.qkv, self.dy, retain_graph=keep)

    def whole(self, attend: Attend) -> None:
        self.products()
        self.backward(self.forward(attend))


def measure(shape: Shape, seconds: float) -> dict[str, Any]:
    """Milliseconds of each part, of one microbatch."""
    layer, tokens = Layer(shape), float(shape.micro_batch * shape.seq_len)
    found: dict[str, Any] = {"products_ms": sustained(layer.products, DEVICE, seconds=seconds), "kernels": {}}
    truth: list[Tensor] = []
    for name in KERNELS:
        try:
            attend = attention_by(name)  # type: ignore[arg-type]
        except ModuleNotFoundError as error:
            found["kernels"][name] = {"missing": str(error)}
            continue
        y = layer.forward(attend)
        values = [y.detach(), *layer.backward(y, keep=True)]
        truth = truth or values
        forward = sustained(lambda: layer.forward(attend), DEVICE, seconds=seconds)  # noqa: B023  # called here
        backward = sustained(lambda: layer.backward(y, keep=True), DEVICE, seconds=seconds)  # noqa: B023
        whole = sustained(lambda: layer.whole(attend), DEVICE, seconds=2 * seconds)  # noqa: B023
        flops = [attention_flops(shape, tokens, backward=b) / shape.layers for b in (False, True)]
        found["kernels"][name] = {
            "forward_ms": forward,
            "backward_ms": backward,
            "tflops": [f / ms * 1e-9 for f, ms in zip(flops, (forward, backward), strict=True)],
            "layer_ms": whole,
            "beyond_products_ms": whole - found["products_ms"],
            "errors": [float((a - t).float().norm() / t.float().norm()) for a, t in zip(values, truth, strict=True)],
        }
    return found


def show(name: str, found: dict[str, Any], console: Console) -> None:
    table = Table("kernels", "forward", "backward", "TFLOP/s", "layer", "beyond its products", title=f"{name}, ms")
    for kernels, row in found["kernels"].items():
        if "missing" in row:
            table.add_row(kernels, "not installed")
            continue
        rates = ", ".join(f"{rate:.0f}" for rate in row["tflops"])
        ms = [f"{row[k]:.3f}" for k in ("forward_ms", "backward_ms", "layer_ms", "beyond_products_ms")]
        table.add_row(kernels, *ms[:2], rates, *ms[2:])
    console.print(table)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention")
    parser.add_argument("--shapes", default="D1,D2", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("python -m benchmarks.attention: torch sees no GPU")
    device = torch.cuda.get_device_name()
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "shapes": {}}
    for name in options.shapes.split(","):
        found["shapes"][name] = measure(SHAPES[name], options.seconds)
        show(name, found["shapes"][name], Console(width=120))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
