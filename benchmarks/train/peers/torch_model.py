"""The model of the plain PyTorch peer: the same function, and the same initial weights, as Stretto's.

Activations are [b, s, h]; or [b s, h], so that what tensor parallelism gathers and scatters is rows, for which torch's
compiler knows how to fuse them with GEMMs. Where nothing cuts the matrices, q, k, v and the two of SwiGLU are one each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.train.shapes import Shape
from stretto.random import normal_

STD = 0.02


class Attention(nn.Module):
    """Causal, grouped queries; `expand` repeats keys where the kernel does not group."""

    def __init__(self, shape: Shape, *, packed: bool, expand: bool) -> None:
        super().__init__()
        h, kv = shape.hidden, shape.kv_dim
        self.dim, self.group, self.expand = shape.head_dim, shape.heads // shape.kv_heads, expand
        self.split = [h, kv, kv]
        if packed:
            self.qkv = nn.Linear(h, h + 2 * kv, bias=False)
        else:
            self.q, self.k, self.v = (nn.Linear(h, n, bias=False) for n in self.split)
        self.packed = packed
        self.o = nn.Linear(h, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.split, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.view(-1, len(cos), t.shape[-1] // self.dim, self.dim) for t in parts)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.group > 1 and self.expand:
            k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.group > 1 and not self.expand)
        out: Tensor = self.o(y.transpose(1, 2).reshape(*x.shape[:-1], -1))
        return out


class FeedForward(nn.Module):
    """SwiGLU or GELU."""

    def __init__(self, shape: Shape, *, packed: bool) -> None:
        super().__init__()
        h, f = shape.hidden, shape.ffn
        self.approximate = "tanh" if shape.activation == "gelu-tanh" else "none"
        self.gated, self.packed = shape.activation == "swiglu", packed and shape.activation == "swiglu"
        if self.packed:
            self.gate_up = nn.Linear(h, 2 * f, bias=False)
        else:
            self.up = nn.Linear(h, f, bias=False)
            if self.gated:
                self.gate = nn.Linear(h, f, bias=False)
        self.down = nn.Linear(f, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            gate, up = self.gate_up(x).chunk(2, -1)
            y = F.silu(gate) * up
        elif self.gated:
            y = F.silu(self.gate(x)) * self.up(x)
        else:
            y = F.gelu(self.up(x), approximate=self.approximate)
        out: Tensor = self.down(y)
        return out


class Block(nn.Module):
    """Norm, attention, norm, feed-forward, each around a residual."""

    def __init__(self, shape: Shape, *, packed: bool, expand: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(shape.hidden, eps=1e-5) for _ in range(2))
        self.attention = Attention(shape, packed=packed, expand=expand)
        self.mlp = FeedForward(shape, packed=packed)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Model(nn.Module):
    """The layers of `layers`; with the embedding where they begin at 0, norm and head where they reach the end.

    Tokens [b, s] or [b s], or activations, in; logits [b, s, V] or [b s, V], or activations, out.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, layers: range, *, packed: bool, expand: bool, dtype: torch.dtype) -> None:
        super().__init__()
        first, last = layers.start == 0, layers.stop == shape.layers
        self.embed = nn.Embedding(shape.vocab, shape.hidden) if first else None
        self.blocks = nn.ModuleDict({str(n): Block(shape, packed=packed, expand=expand) for n in layers})
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5) if last else None
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False) if last else None
        cos, sin = _angles(shape.seq_len, shape.head_dim)
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            # A copy waits for the messages of a cut embedding here, so that compiled blocks see a plain tensor.
            x = self.embed(x).to(self.cos.dtype).clone()
        for block in self.blocks.values():
            x = block(x, self.cos, self.sin)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def loss_of(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """Sum of the tokens' cross-entropies, in fp32, by the tokens of the global batch."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / count


def fill(model: Model, shape: Shape, seed: int) -> None:
    """The weights with which Stretto begins under `seed`."""
    small = STD / (2 * shape.layers) ** 0.5
    with torch.no_grad():
        for name, weight, std in _matrices(model, small):
            normal_(weight, seed=seed, name=name, full_shape=weight.shape, offsets=(0, 0), std=std)


def _matrices(model: Model, small: float) -> Iterator[tuple[str, Tensor, float]]:
    """Each logical matrix: its name in Stretto, the weights, the standard deviation."""
    if model.embed is not None:
        yield "model.embed_tokens.weight", model.embed.weight, STD
    for n, block in model.blocks.items():
        assert isinstance(block, Block)
        a, m, at = block.attention, block.mlp, f"model.layers.{n}"
        qkv = a.qkv.weight.split(a.split) if a.packed else (a.q.weight, a.k.weight, a.v.weight)
        for name, weight in zip("qkv", qkv, strict=True):
            yield f"{at}.self_attn.{name}_proj.weight", weight, STD
        yield f"{at}.self_attn.o_proj.weight", a.o.weight, small
        if m.packed:
            ffn = dict(zip(("gate", "up"), m.gate_up.weight.chunk(2), strict=True))
        else:
            ffn = {"gate": m.gate.weight} if m.gated else {}
            ffn["up"] = m.up.weight
        for name, weight in ffn.items():
            yield f"{at}.mlp.{name}_proj.weight", weight, STD
        yield f"{at}.mlp.down_proj.weight", m.down.weight, small
    if model.head is not None:
        yield "lm_head.weight", model.head.weight, STD


def _angles(seq_len: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [s, 1, d], in fp64."""
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(seq_len, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[:, None, :]
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
