"""The shapes that are compared, as data, and how each is laid over two devices. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

PARALLEL = ("one", "dp", "tp", "pp")
"""Ways to use the devices: one alone, or data, tensor (with sequence parallelism) or pipeline parallel over all."""


@dataclass(frozen=True)
class Shape:
    """One transformer and its batch: pre-norm RMSNorm, rotary positions, untied head, no biases."""

    name: str
    about: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    activation: Literal["swiglu", "gelu", "gelu-tanh"]
    seq_len: int
    micro_batch: int
    """Sequences that one rank computes at a time."""
    global_batch: int
    """Sequences of one optimizer step, over all ranks."""

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden // self.heads

    @property
    def kv_dim(self) -> int:
        """Columns of the key, and of the value, projection."""
        return self.kv_heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.global_batch * self.seq_len

    @property
    def gated(self) -> int:
        """Matrices that enter the feed-forward block: 2 with SwiGLU, 1 with GELU."""
        return 2 if self.activation == "swiglu" else 1

    @property
    def matrices(self) -> dict[str, tuple[int, int, int]]:
        """Each matrix that tokens are multiplied with: (d_in, d_out, how often it is in the model)."""
        h, f = self.hidden, self.ffn
        return {
            "qkv": (h, h + 2 * self.kv_dim, self.layers),
            "attention out": (h, h, self.layers),
            "ffn in": (h, self.gated * f, self.layers),
            "ffn out": (f, h, self.layers),
            "head": (h, self.vocab, 1),
        }

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: all matrices, not the embedding's table."""
        return sum(d_in * d_out * times for d_in, d_out, times in self.matrices.values())

    @property
    def parameters(self) -> int:
        """All parameters: matrices, embedding, norms."""
        return self.multiplied + self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden

    def microbatches(self, dp: int) -> int:
        """Microbatches of one step on each of `dp` replicas. Raises ValueError when they do not divide."""
        rest = self.global_batch % (self.micro_batch * dp)
        if rest:
            raise ValueError(f"{self.name}: {self.global_batch} sequences do not divide over {dp} x {self.micro_batch}")
        return self.global_batch // (self.micro_batch * dp)


_D1 = Shape(
    name="D1",
    about="one device: Llama-like, 1.4 billion parameters",
    layers=24,
    hidden=2048,
    heads=16,
    kv_heads=16,
    ffn=5632,
    vocab=32_768,
    activation="swiglu",
    seq_len=4096,
    micro_batch=4,
    global_batch=4,
)
_EIGHT_LAYERS = {
    "layers": 8,
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 8,
    "ffn": 14_336,
    "vocab": 32_768,
    "seq_len": 8192,
    "micro_batch": 1,
}
_D2 = Shape(
    name="D2",
    about="one device: eight layers of the width of Llama-3-8B, accumulation 4",
    activation="swiglu",
    global_batch=4,
    **_EIGHT_LAYERS,
)
_D3 = Shape(
    name="D3",
    about="one device: GELU and a large vocabulary, accumulation 8; Megatron has published 36.3k tokens/s on 48 H100s",
    layers=24,
    hidden=2048,
    heads=16,
    kv_heads=16,
    ffn=8192,
    vocab=131_072,
    activation="gelu",
    seq_len=4096,
    micro_batch=4,
    global_batch=32,
)
_D4 = Shape(
    name="D4",
    about="two devices: the model of D2, 65,536 tokens a step",
    activation="swiglu",
    global_batch=8,
    **_EIGHT_LAYERS,
)
_SMALL = {
    "layers": 12,
    "hidden": 768,
    "heads": 12,
    "kv_heads": 12,
    "ffn": 2048,
    "vocab": 50_304,
    "activation": "swiglu",
    "seq_len": 1024,
    "global_batch": 64,
}
_S4 = Shape(
    name="S4",
    about="one device: the size of GPT-2 small, sixteen microbatches: the host has more to launch than the GPU to do",
    micro_batch=4,
    **_SMALL,
)
_S16 = Shape(name="S16", about="S4 in four microbatches", micro_batch=16, **_SMALL)
_D0 = Shape(
    name="D0",
    about="a test of the benchmark itself, on a CPU",
    layers=4,
    hidden=64,
    heads=4,
    kv_heads=2,
    ffn=96,
    vocab=512,
    activation="swiglu",
    seq_len=32,
    micro_batch=2,
    global_batch=8,
)
SHAPES = MappingProxyType({shape.name: shape for shape in (_D0, _D1, _D2, _D3, _D4, _S4, _S16)})
"""By name."""


@dataclass(frozen=True)
class Job:
    """What every peer of a run is given: the same shape, layout, precision, seed and tokens."""

    shape: Shape
    parallel: str
    """One of `PARALLEL`."""
    nproc: int
    device: Literal["cpu", "cuda"]
    dtype: Literal["bf16", "fp32"]
    """Of weights in the forward and of activations; masters, moments and gradients are fp32."""
    compile: bool
    tokens: str
    """The token store that all peers read."""
    words: str = ""
    """Settings of this peer alone, as one string of command-line words."""
    seed: int = 1234
    lr: float = 1e-4

    def size(self, axis: str) -> int:
        """Ranks along dp, tp or pp."""
        return self.nproc if axis == self.parallel else 1

    @property
    def rank_tokens(self) -> float:
        """Tokens of a step by the number of devices."""
        return self.shape.tokens / self.nproc
