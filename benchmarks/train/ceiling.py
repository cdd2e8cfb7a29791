"""What no step can be quicker than on this device: the same products, attention and bytes at their measured rates.

Gemms and attention run for long enough that the clocks settle where the power limit holds them. Communication is
taken as hidden, so over several devices only the bubble of a pipeline is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.train.flops import attention_flops, elementwise_bytes, optimizer_bytes, product_flops
from benchmarks.train.measure import sustained
from benchmarks.train.shapes import Job, Shape

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure(job: Job, device: torch.device, say: Callable[[str], None], *, seconds: float) -> dict[str, Any]:
    """Milliseconds of one step of a rank by item, and their sum; each rate is measured over `seconds`."""
    shape, dtype = job.shape, DTYPES[job.dtype]
    share = job.rank_tokens / (shape.micro_batch * shape.seq_len)  # microbatches' worth of work of one rank
    products: list[dict[str, Any]] = []
    total_flops = 0.0
    for name, (d_in, d_out, times) in shape.matrices.items():
        ms = _gemms(shape.micro_batch * shape.seq_len, d_in, d_out, dtype, device, seconds)
        flops = 2.0 * shape.micro_batch * shape.seq_len * d_in * d_out
        row: dict[str, Any] = {"matrix": name, "shape": [d_in, d_out], "times": times, "ms": ms}
        row["tflops"] = {which: flops / t * 1e-9 for which, t in ms.items()}
        products.append(row)
        total_flops += 3 * flops * times
        say(f"  {name}: " + ", ".join(f"{which} {rate:.0f} TFLOP/s" for which, rate in row["tflops"].items()))
    copy = _copy_bytes_per_ms(device, seconds)
    say(f"  copy: {copy * 1e-9:.2f} TB/s")
    attention = _attention(shape, dtype, device, seconds)
    for row in attention["backends"]:
        say(f"  attention, {row['backend']}: forward {row['forward_ms']:.3f} ms, backward {row['backward_ms']:.3f} ms")
    width = torch.finfo(dtype).bits // 8
    elementwise = {n: b / copy for n, b in elementwise_bytes(shape, job.rank_tokens, width=width).items()}
    items = {
        "products": share * sum(row["times"] * sum(row["ms"].values()) for row in products),
        "attention forward": share * shape.layers * attention["best"]["forward_ms"],
        "attention backward": share * shape.layers * attention["best"]["backward_ms"],
        "elementwise": sum(elementwise.values()),
        "optimizer": optimizer_bytes(shape.parameters / job.nproc, width=width) / copy,
    }
    head = 3 * shape.vocab * job.rank_tokens * width / copy + share * sum(products[-1]["ms"].values())
    items["bubble"] = bubble(items, head, job)
    step = sum(items.values())
    return {
        "items_ms": items,
        "step_ms": step,
        "tokens_per_second_per_gpu": job.rank_tokens / (step * 1e-3),
        "products": products,
        "attention": attention,
        "elementwise_ms": elementwise,
        "copy_tb_per_second": copy * 1e-9,
        "best_tflops": max(rate for row in products for rate in row["tflops"].values()),
        "products_tflops": total_flops * share / items["products"] * 1e-9,
        "model_flops": product_flops(shape, job.rank_tokens, layers=shape.layers, head=True),
    }


def bubble(items: dict[str, float], head: float, job: Job) -> float:
    """Milliseconds that a rank of a 1F1B pipeline waits at least: p - 1 of its microbatches, and for the last stage,
    which has the head besides its share of the layers. `items` and `head` are milliseconds of an even share.

    With p equal ranks and the head on the last alone, the last one is busy for all m microbatches, and before and
    after them the others are for one: step = m * last + (p - 1) * other.
    """
    p = job.size("pp")
    if p == 1:
        return 0.0
    m = job.shape.microbatches(1)
    work = sum(ms for name, ms in items.items() if name != "optimizer")
    other = (work - head) / m  # of one microbatch; `head` over all ranks is p times its share
    return m * (other + p * head / m) + (p - 1) * other - work


def _gemms(tokens: int, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device, s: float) -> dict[str, float]:
    """Milliseconds of y = x W^T, of dx = dy W, and of dW = dy^T x, on random values."""
    x, dy = (torch.randn(tokens, n, dtype=dtype, device=device) for n in (d_in, d_out))
    w = torch.randn(d_out, d_in, dtype=dtype, device=device)
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)
    return {
        "forward": sustained(lambda: torch.mm(x, w.t(), out=y), device, seconds=s),
        "input gradient": sustained(lambda: torch.mm(dy, w, out=dx), device, seconds=s),
        "weight gradient": sustained(lambda: torch.mm(dy.t(), x, out=dw), device, seconds=s),
    }


def _copy_bytes_per_ms(device: torch.device, seconds: float) -> float:
    """Bytes read and written by a large copy."""
    size = 2**32 if device.type == "cuda" else 2**24
    a = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    b = torch.empty_like(a)
    return 2 * size / sustained(lambda: b.copy_(a), device, seconds=seconds)


def _attention(shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, Any]:
    """Each back end that takes the shape; the best by forward and backward together."""
    rows: list[dict[str, Any]] = []
    for backend in BACKENDS:
        if backend is SDPBackend.MATH and rows:  # it would need the whole square of the sequence
            continue
        for grouped in (True, False):
            try:
                rows.append(_attention_by(backend, grouped, shape, dtype, device, seconds))
                break
            except RuntimeError:  # this back end does not take this shape
                continue
    return {"backends": rows, "best": min(rows, key=lambda row: row["forward_ms"] + row["backward_ms"])}


def _attention_by(
    backend: SDPBackend, grouped: bool, shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float
) -> dict[str, Any]:
    b, s, d = shape.micro_batch, shape.seq_len, shape.head_dim
    kv = shape.kv_heads if grouped else shape.heads
    q, k, v = (  # as in the model: a view of [b, s, heads, d]
        torch.randn(b, s, n, d, dtype=dtype, device=device).transpose(1, 2).requires_grad_()
        for n in (shape.heads, kv, kv)
    )

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv != shape.heads)

    y = forward()
    dy = torch.randn_like(y)
    ahead = sustained(forward, device, seconds=seconds)
    back = sustained(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), device, seconds=seconds)
    tokens = float(b * s)
    return {
        "backend": backend.name,
        "keys": "grouped" if grouped else "repeated",
        "forward_ms": ahead,
        "backward_ms": back,
        "forward_tflops": attention_flops(shape, tokens, backward=False) / shape.layers / ahead * 1e-9,
        "backward_tflops": attention_flops(shape, tokens, backward=True) / shape.layers / back * 1e-9,
    }
