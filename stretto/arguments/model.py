"""The model's part of the schema: one decoder-only transformer, of any family that is made of these parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from stretto.arguments.setting import setting

GATED: Final = frozenset({"swiglu", "clamped-swiglu", "geglu", "geglu-tanh"})
"""Activations that multiply two projections of their input, one of them through the non-linearity."""


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer."""

    layers: int = setting(4, "transformer blocks", at_least=1, at_most=2**14)
    hidden: int = setting(256, "size of the residual stream", at_least=1, at_most=2**20)
    heads: int = setting(8, "attention heads (queries)", at_least=1, at_most=2**16)
    kv_heads: int | None = setting(
        None, "key/value heads; fewer than heads is grouped-query attention", at_least=1, at_most=2**16
    )
    head_dim: int | None = setting(None, "size of one attention head", at_least=1, at_most=2**16)
    ffn: int | None = setting(None, "inner size of the feed-forward block", at_least=1, at_most=2**24)
    vocab: int | None = setting(
        None, "entries of the vocabulary, before padding", unit="tokens", at_least=2, at_most=2**26
    )
    norm: Literal["rms", "layer"] = setting("rms", "RMSNorm or LayerNorm")
    norm_eps: float = setting(1e-5, "added to the variance in a norm", above=0)
    norm_zero_centered: bool = setting(False, "an RMSNorm multiplies by 1 + its weight, as in Gemma")
    norm_placement: Literal["pre", "post", "sandwich"] = setting(
        "pre", "norms before attention and feed-forward, after them (as in OLMo 2), or both (as in Gemma 2)"
    )
    parallel_residual: bool = setting(False, "attention and feed-forward read the same residual, as in GPT-NeoX")
    position: Literal["rope", "learned"] = setting("rope", "rotary or learned absolute positions")
    learned_positions: int | None = setting(
        None, "positions that a learned embedding has; unset: seq_len", unit="tokens", at_least=1, at_most=2**26
    )
    rope_base: float = setting(10_000.0, "base of the rotary wavelengths", above=1)
    rope_local_base: float | None = setting(
        None, "base of the rotary wavelengths, unscaled, of layers with a window; unset: as the other layers", above=1
    )
    rope_share: float = setting(1.0, "share of each head that is rotated, its first features", above=0, at_most=1)
    rope_scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = setting(
        "none", "how rotary wavelengths are stretched for longer contexts"
    )
    rope_factor: float = setting(1.0, "with rope_scaling, contexts become so many times as long", at_least=1)
    rope_original_positions: int | None = setting(
        None, "with rope_scaling, positions before the stretch", unit="tokens", at_least=1, at_most=2**40
    )
    rope_low_freq: float = setting(
        1.0,
        "with llama3, wavelengths with fewer turns than this in the original positions are stretched whole",
        above=0,
    )
    rope_high_freq: float = setting(4.0, "with llama3, wavelengths with more turns than this are left alone", above=0)
    rope_beta_fast: float = setting(32.0, "with yarn, wavelengths with more turns than this are left alone", above=0)
    rope_beta_slow: float = setting(1.0, "with yarn, wavelengths with fewer turns are stretched whole", above=0)
    rope_whole_pairs: bool = setting(True, "with yarn, the range between the two begins and ends at whole pairs")
    rope_mscale: float | None = setting(
        None,
        "with yarn and a latent, cosines and sines are multiplied by m(rope_mscale) / m(rope_mscale_all), "
        "m(x) = 0.1 x ln(rope_factor) + 1",
        above=0,
    )
    rope_mscale_all: float | None = setting(
        None, "with yarn and a latent, attention scores are multiplied by the square of m(rope_mscale_all)", above=0
    )
    rope_attention_factor: float | None = setting(
        None,
        "with yarn or longrope, cosines and sines are multiplied by this; unset: 0.1 ln(rope_factor) + 1, or the root "
        "of 1 + ln(rope_factor) / ln(rope_original_positions)",
        above=0,
    )
    rope_short_factors: tuple[float, ...] = setting(
        (), "with longrope, what each wavelength is stretched by in sequences up to the original positions", above=0
    )
    rope_long_factors: tuple[float, ...] = setting(
        (), "with longrope, what each wavelength is stretched by in longer sequences", above=0
    )
    window: int | None = setting(
        None,
        "each position attends to so many at most, itself the last; unset: to all before it",
        at_least=1,
        at_most=2**26,
    )
    global_layers: tuple[int, ...] = setting((), "layers without the window, counted from 0", at_least=0)
    kv_lora_rank: int | None = setting(
        None,
        "multi-head latent attention, as in DeepSeek: keys and values of all heads come from a latent of this size; "
        "unset: each from the residual stream",
        at_least=1,
        at_most=2**20,
    )
    q_lora_rank: int | None = setting(
        None, "with a latent of keys and values: the size of one of the queries; unset: none", at_least=1, at_most=2**20
    )
    rope_head_dim: int | None = setting(
        None,
        "with a latent: so many last features of each head are rotated, and all key heads share theirs",
        at_least=2,
        at_most=2**16,
    )
    v_head_dim: int | None = setting(
        None, "with a latent: size of a value head; unset: head_dim - rope_head_dim", at_least=1, at_most=2**16
    )
    rope_interleaved: bool = setting(
        True, "with a latent: a feature turns with its neighbour; else with the one half of the rotated features away"
    )
    attention_scalar: float | None = setting(
        None, "attention scores are divided by its square root; unset: head_dim", above=0
    )
    attention_softcap: float | None = setting(
        None, "attention scores x become c tanh(x / c), as in Gemma 2; unset: they stay", above=0
    )
    attention_sinks: bool = setting(
        False,
        "each head has a learned score of a key that has no value, as in gpt-oss: weights may add up to less than 1",
    )
    logit_softcap: float | None = setting(
        None, "output logits x become c tanh(x / c), as in Gemma 2; unset: they stay", above=0
    )
    activation: Literal["swiglu", "clamped-swiglu", "geglu", "geglu-tanh", "gelu", "gelu-tanh"] = setting(
        "swiglu",
        "non-linearity of the feed-forward block; gelu is the exact one, gelu-tanh that of GPT-2, clamped-swiglu that "
        "of gpt-oss",
    )
    swiglu_limit: float = setting(
        7.0, "clamped-swiglu: the gate is at most this, the other projection within it on both sides", above=0
    )
    swiglu_alpha: float = setting(1.702, "clamped-swiglu: (up + 1) gate sigmoid(swiglu_alpha gate)", above=0)
    bias: bool = setting(False, "biases in all linear layers, router and experts among them")
    qkv_bias: bool = setting(False, "biases in the query, key and value projections alone")
    qkv_clip: float | None = setting(
        None,
        "queries, keys and values stay within this on both sides, before rotary embedding and after norms of heads, as "
        "in OLMoE; unset: they stay as they are",
        above=0,
    )
    tied: bool = setting(False, "one matrix serves as embedding and as output head")
    scale_embedding: bool = setting(False, "embeddings are multiplied by the root of hidden, as in Gemma")
    qk_norm: bool = setting(False, "normalize queries and keys")
    qk_norm_width: Literal["head", "full"] = setting(
        "head", "qk_norm is over each head, as in Qwen3, or over all heads together, as in OLMo 2"
    )
    experts: int = setting(0, "routed experts of a sparse block; 0: every block is dense", at_least=0, at_most=2**14)
    top_k: int = setting(2, "experts that each token goes to", at_least=1, at_most=2**14)
    expert_ffn: int | None = setting(None, "inner size of each expert; unset: ffn", at_least=1, at_most=2**22)
    shared_ffn: int = setting(
        0,
        "inner size of the shared expert, which every token goes through; 0: there is none",
        at_least=0,
        at_most=2**22,
    )
    shared_gate: bool = setting(False, "the shared expert's output is multiplied by a sigmoid of its own")
    first_dense: int = setting(0, "so many first blocks are dense", at_least=0)
    sparse_every: int = setting(
        1, "of the other blocks each n-th is sparse: those whose number + 1 divides", at_least=1
    )
    dense_layers: tuple[int, ...] = setting((), "further blocks that are dense, counted from 0", at_least=0)
    router: Literal["softmax", "softmax-top-k", "sigmoid"] = setting(
        "softmax", "scores of the experts: softmax over all, over the chosen alone, or a sigmoid of each"
    )
    router_renormalize: bool = setting(True, "weights of the chosen experts are divided by their sum")
    router_scale: float = setting(1.0, "weights of the chosen experts are multiplied by this", above=0)
    router_groups: int = setting(1, "experts form so many groups, of which only the best are chosen from", at_least=1)
    router_top_groups: int = setting(1, "groups that are chosen from", at_least=1)
    router_group_score: Literal["max", "top2"] = setting(
        "max", "how good a group is: its best score, or the sum of its two best"
    )
    router_bias: bool = setting(False, "a bias of each expert takes part in the choice, not in the weights")
    router_bias_rate: float = setting(
        1e-3, "after each step the biases move by this towards equal loads, from counts of the global batch", at_least=0
    )
    balance_loss: float = setting(
        0.0,
        "coefficient of the loss that keeps loads equal, over the global batch, with the loads of the step before",
        at_least=0,
    )
    router_z_loss: float = setting(
        0.0, "coefficient of the mean square of the router's logsumexp over the global batch", at_least=0
    )
    expert_capacity: float = setting(
        0.0,
        "an expert takes at most this times its equal share of a document's tokens (a plain row is one document); 0: "
        "all, none is dropped",
        at_least=0,
    )
    expert_drop: Literal["last", "lowest"] = setting(
        "last", "beyond the capacity of an expert: the last tokens of a document are dropped, or those of lowest weight"
    )
    mtp_layers: int = setting(
        0,
        "multi-token prediction, as in DeepSeek-V3: so many further layers behind the last; the n-th learns to predict "
        "the token n places after the next, and sampling leaves it out",
        at_least=0,
        at_most=16,
    )
    mtp_loss: float = setting(0.3, "weight of the mean of the losses of these layers", at_least=0)
    init_std: float = setting(0.02, "standard deviation of the initial weights", above=0)
    dropout: float = setting(
        0.0, "share of the embedding's and of each layer's outputs set to 0 in training", at_least=0, below=1
    )

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads: `kv_heads`, or as many as query heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def dim_per_head(self) -> int:
        """Size of one head: `head_dim`, or hidden / heads."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def latent(self) -> bool:
        """Whether keys and values of all heads come from a latent (multi-head latent attention)."""
        return self.kv_lora_rank is not None

    @property
    def dim_value(self) -> int:
        """Size of a value head."""
        if self.kv_lora_rank is None:
            return self.dim_per_head
        return self.dim_per_head - self.dim_rotary if self.v_head_dim is None else self.v_head_dim

    @property
    def attention_scale(self) -> float | None:
        """What attention scores are multiplied by; None: 1 / sqrt(dim_per_head)."""
        scale = None if self.attention_scalar is None else 1 / math.sqrt(self.attention_scalar)
        if self.rope_mscale_all is None:
            return scale
        share = self.yarn_mscale(self.rope_mscale_all)
        return (1 / math.sqrt(self.dim_per_head) if scale is None else scale) * share * share

    def yarn_mscale(self, share: float = 1.0) -> float:
        """How scores grow with the length (Peng et al., "YaRN", 2023, equation 22, by its root)."""
        return 0.1 * share * math.log(self.rope_factor) + 1 if self.rope_factor > 1 else 1.0

    @property
    def dim_rotary(self) -> int:
        """Features of a head that are rotated."""
        d = self.dim_per_head
        if self.kv_lora_rank is not None:
            return d // 2 if self.rope_head_dim is None else self.rope_head_dim
        return d if self.rope_share == 1 else int(min(d, 1 << 53) * self.rope_share)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has two matrices on its way in."""
        return self.activation in GATED

    @property
    def dim_ffn(self) -> int:
        """Inner size of the feed-forward block: `ffn`, or 4h, or where gated the next multiple of 64 of 8h/3."""
        if self.ffn is not None:
            return self.ffn
        return -(-(8 * self.hidden) // (3 * 64)) * 64 if self.gated else 4 * self.hidden

    @property
    def dim_expert(self) -> int:
        """Inner size of a routed expert: `expert_ffn`, or that of a dense block."""
        return self.dim_ffn if self.expert_ffn is None else self.expert_ffn

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward of that layer is made of experts."""
        if self.experts == 0 or layer < self.first_dense or layer in self.dense_layers:
            return False
        return (layer + 1) % self.sparse_every == 0

    @property
    def further_layers(self) -> range:
        """Numbers of the layers that predict further tokens: those behind the last."""
        return range(self.layers, self.layers + self.mtp_layers)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers with experts, those that predict further tokens among them."""
        return tuple(layer for layer in range(self.further_layers.stop) if self.is_sparse(layer))

    @property
    def shared_embedding(self) -> bool:
        """Whether the last stage needs the embedding, too: as its head, or to read what it is to predict next."""
        return self.tied or self.mtp_layers > 0

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, unpadded; known once the tokenizer is."""
        if self.vocab is None:
            raise ValueError("model.vocab is not resolved yet: it comes from the tokenizer")
        return self.vocab

    def window_of(self, layer: int) -> int | None:
        """How many positions a position of that layer attends to at most, or None for all before it."""
        return None if layer in self.global_layers else self.window
