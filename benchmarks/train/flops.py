"""Operations and bytes of one training step, counted by hand. Never imports torch.

Forward and backward of a product of [T, k] with [k, n] are 3 products of 2 T k n operations. Of attention, forward
q k^T and p v, backward the four that follow from them, are counted over the whole square of the sequence (full), or
over the half of it that a causal mask leaves (causal). Recomputation is never counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.train.shapes import Shape

PEAK_TFLOPS = 989.5
"""Dense bf16 of an H100 SXM by its datasheet; the H200 has the same chip."""


def flops_per_token(shape: Shape, *, causal: bool = False) -> float:
    """6 N + 12 L h s, or half of the second term; N as `Shape.multiplied`."""
    attention = 12 * shape.layers * shape.hidden * shape.seq_len
    return 6.0 * shape.multiplied + attention * (0.5 if causal else 1.0)


@dataclass(frozen=True)
class Rate:
    """What a step of some milliseconds comes to."""

    tokens_per_second_per_gpu: float
    tflops_full: float
    tflops_causal: float
    mfu_full: float
    """Share of `PEAK_TFLOPS`, as is the next."""
    mfu_causal: float


def rate(shape: Shape, ms: float, gpus: int) -> Rate:
    """Of a step over all `gpus`."""
    speed = shape.tokens / (ms * 1e-3) / gpus
    full, causal = (flops_per_token(shape, causal=c) * speed * 1e-12 for c in (False, True))
    return Rate(speed, full, causal, full / PEAK_TFLOPS, causal / PEAK_TFLOPS)


def elementwise_bytes(shape: Shape, tokens: float, *, width: int = 2) -> dict[str, float]:
    """Bytes of everything between products for `tokens` tokens, each value `width` bytes.

    Every chain of elementwise operations between two products (or a product and attention) is one pass that reads
    its inputs and writes its outputs once: the floor of a fusion that does not reach into the products.
    """
    h, f = shape.hidden, shape.ffn
    rotated = shape.hidden + shape.kv_dim
    per_layer = {
        # forward: read residual and branch, write residual and normed. Backward: read the gradient of the normed, the
        # gradient of the residual and the input, write the gradient. Two of each.
        "norms and residuals": 2 * (4 * h + 4 * h),
        # forward: read and write q and k; backward the same.
        "rotary positions": 4 * rotated,
        # forward: read what came in, write one; backward: read the gradient and what came in, write its gradients.
        "activation": (shape.gated + 1) * f + (1 + 2 * shape.gated) * f,
    }
    counted = {name: count * shape.layers * tokens * width for name, count in per_layer.items()}
    counted["final norm and embedding"] = (2 + 3 + 1 + 2) * h * tokens * width
    # forward: read the logits once; backward: read them again, write their gradient.
    counted["loss"] = 3 * shape.vocab * tokens * width
    return counted


def optimizer_bytes(parameters: float, *, width: int = 2) -> float:
    """Bytes of clipping and AdamW: gradient once for the norm; then gradient, master and two moments read, master and
    moments written, and the weight of `width` bytes written."""
    return parameters * (4 + 4 * 4 + 3 * 4 + width)


def attention_flops(shape: Shape, tokens: float, *, backward: bool) -> float:
    """Causal operations of all layers: 2 products forward; 5 backward, as the kernels do one again."""
    one = tokens * shape.seq_len * shape.hidden  # 2 s h per token, halved by the mask
    return shape.layers * one * (5 if backward else 2)


def product_flops(shape: Shape, tokens: float, *, layers: int, head: bool) -> float:
    """Operations of forward and backward of the products of `layers` layers, and of the head, for `tokens` tokens."""
    a_layer = sum(d_in * d_out for name, (d_in, d_out, _) in shape.matrices.items() if name != "head")
    return 6.0 * tokens * (layers * a_layer + (shape.vocab * shape.hidden if head else 0))
