"""How the layers of common Hugging Face models are cut over tensor-parallel ranks, for `parallelize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from stretto.interop.suggest import suggestion
from stretto.tensor_parallel.foreign import Plan
from stretto.tensor_parallel.foreign_layers import Around, Border, Colwise, Experts, Replicated, Rowwise, Style, Vocab
from stretto.world import Axis


def plan_of(model: nn.Module, axis: Axis, *, sequence_parallel: bool = False, gather_logits: bool = True) -> Plan:
    """The plan of a causal language model of transformers, by its `config`.

    Fewer key/value heads than ranks are held by several of them, where they have matrices of their own. Under
    `sequence_parallel` each rank has its part of the sequence between attention and feed-forward. Unless
    `gather_logits` they stay cut by words.

    Raises:
        ValueError: no plan for such models, or their heads do not divide.
    """
    config: Any = getattr(model, "config", None)
    family = str(getattr(config, "model_type", None))
    if family not in _FAMILIES or not hasattr(model, "lm_head"):
        raise ValueError(
            f"no plan for {type(model).__name__} of model_type {family}; there are plans for the causal language models"
            f" {', '.join(_FAMILIES)}. {suggestion(model)}"
        )
    return _FAMILIES[family](config, axis, _Borders(sequence_parallel, gather_logits))


@dataclass(frozen=True)
class _Borders:
    """Where activations cross into what ranks compute parts of, with sequence parallelism and without."""

    sequence: bool
    gather: bool

    @property
    def inside(self) -> Border:
        """Of layers whose input the module around them has gathered."""
        return "none" if self.sequence else "whole"

    @property
    def out(self) -> Border:
        return "sequence" if self.sequence else "whole"

    def around(self, *modules: str) -> dict[str, Style]:
        return {name: Around("whole") for name in modules} if self.sequence else {}

    def ends(self, embedding: str, first: str, norm: str) -> dict[str, Style]:
        """The embedding, the first block, the norm after the last and the head."""
        return {
            embedding: Vocab(),
            **({first: Around("part")} if self.sequence else {}),
            norm: Replicated(partial=self.sequence, gathers=self.sequence),
            "lm_head": Vocab(self.gather, border=self.inside),
        }

    def whole(self, attributes: Mapping[str, Any]) -> Around:
        """Attention, whose forward reads these numbers."""
        return Around("whole" if self.sequence else "as it comes", attributes)


def _llama(config: Any, axis: Axis, borders: _Borders) -> Mapping[str, Style]:
    """Of all that have its names: Mistral, Qwen2, Qwen3 and Gemma 3 (norms of a head, which all share) and others."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    _require_heads(heads, axis)
    # With fewer key/value heads than ranks each rank has one, for all of its queries.
    groups = {"num_key_value_groups": heads // axis.size if axis.size > kv else heads // kv}
    shared = config.model_type in ("qwen3", "qwen3_moe", "gemma3_text")
    return {
        **borders.ends("model.embed_tokens", "model.layers.0", "model.norm"),
        "*.self_attn": borders.whole(groups),
        "*.self_attn.q_proj": Colwise(heads, border=borders.inside),
        "*.self_attn.[kv]_proj": Colwise(kv, copied=True, border=borders.inside),
        "*.self_attn.o_proj": Rowwise(heads, border=borders.out),
        **({"*.self_attn.[qk]_norm": Replicated(partial=True)} if shared else {}),
        **_feed_forward(borders),
        "*norm": Replicated(partial=borders.sequence),
    }


def _feed_forward(borders: _Borders) -> Mapping[str, Style]:
    return {
        **borders.around("*.mlp"),
        "*.mlp.gate_proj": Colwise(border=borders.inside),
        "*.mlp.up_proj": Colwise(border=borders.inside),
        "*.mlp.down_proj": Rowwise(border=borders.out),
    }


def _phi3(config: Any, axis: Axis, borders: _Borders) -> Mapping[str, Style]:
    """Queries, keys and values are one matrix, and gate and up another: each is cut by itself."""
    heads, kv, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    _require_heads(heads, axis)
    if kv % axis.size:
        raise ValueError(
            f"{kv} key/value heads in one matrix with the queries over {axis.name}={axis.size} ranks: the ranks must "
            "divide them; take fewer tensor-parallel ranks"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    read = copy(config)  # its forward finds the keys behind the queries of the config
    read.num_attention_heads = heads // axis.size
    return {
        **borders.ends("model.embed_tokens", "model.layers.0", "model.norm"),
        "*.self_attn": borders.whole({"config": read, "num_key_value_heads": kv // axis.size}),
        "*.qkv_proj": Colwise(heads + 2 * kv, border=borders.inside, sections=(heads * size, kv * size, kv * size)),
        "*.self_attn.o_proj": Rowwise(heads, border=borders.out),
        **borders.around("*.mlp"),
        "*.gate_up_proj": Colwise(border=borders.inside, sections=(inner, inner)),
        "*.mlp.down_proj": Rowwise(border=borders.out),
        "*norm": Replicated(partial=borders.sequence),
    }


def _moe(config: Any, axis: Axis, borders: _Borders) -> Mapping[str, Style]:
    """Routers see all tokens on every rank, so that losses of balance are what they were; experts are cut inside."""
    dense = _llama(config, axis, borders)
    sparse = _sparse_layers(config)
    blocks = {f"model.layers.{n}.mlp": Around("and gives") for n in sparse} if borders.sequence else {}
    within: dict[str, Style] = {"*.mlp.gate": Replicated(), "*.mlp.experts": Experts()}
    if config.model_type == "qwen2_moe":
        within |= {
            "*.mlp.shared_expert_gate": Replicated(),
            "*.mlp.shared_expert.gate_proj": Colwise(),
            "*.mlp.shared_expert.up_proj": Colwise(),
            "*.mlp.shared_expert.down_proj": Rowwise(),
        }
    if len(sparse) == config.num_hidden_layers:
        dense = {name: style for name, style in dense.items() if not name.startswith("*.mlp")}
    return {**blocks, **within, **dense}


def _sparse_layers(config: Any) -> list[int]:
    """As transformers chooses them."""
    step = getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", None) or ()
    return [n for n in range(config.num_hidden_layers) if n not in dense and (n + 1) % step == 0]


def _gpt2(config: Any, axis: Axis, borders: _Borders) -> Mapping[str, Style]:
    """Its layers are `Conv1D`, and the thirds of c_attn are cut each by itself."""
    heads, width = config.num_attention_heads, config.hidden_size
    _require_heads(heads, axis)
    if config.add_cross_attention:
        raise ValueError("a GPT-2 with add_cross_attention has no plan: its keys and values come from another model")
    return {
        **borders.ends("transformer.wte", "transformer.h.0", "transformer.ln_f"),
        "transformer.wpe": Replicated(),
        "*.attn": borders.whole({"num_heads": heads // axis.size, "split_size": width // axis.size}),
        "*.attn.c_attn": Colwise(3 * heads, border=borders.inside, sections=(width,) * 3),
        "*.attn.c_proj": Rowwise(heads, border=borders.out),
        **borders.around("*.mlp"),
        "*.mlp.c_fc": Colwise(border=borders.inside),
        "*.mlp.c_proj": Rowwise(border=borders.out),
        "*.ln_[12]": Replicated(partial=borders.sequence),
    }


def _gpt_neox(config: Any, axis: Axis, borders: _Borders) -> Mapping[str, Style]:
    """Queries, keys and values of each head stand together in one matrix, so it is cut between heads."""
    heads = config.num_attention_heads
    _require_heads(heads, axis)
    return {
        **borders.ends("gpt_neox.embed_in", "gpt_neox.layers.0", "gpt_neox.final_layer_norm"),
        **borders.around("*.attention", "*.mlp"),
        "*.attention.query_key_value": Colwise(heads, border=borders.inside),
        "*.attention.dense": Rowwise(heads, border=borders.out),
        "*.dense_h_to_4h": Colwise(border=borders.inside),
        "*.dense_4h_to_h": Rowwise(border=borders.out),
        "*norm": Replicated(partial=borders.sequence),
    }


def _require_heads(heads: int, axis: Axis) -> None:
    if heads % axis.size:
        raise ValueError(f"{heads} attention heads over {axis.name}={axis.size} ranks: the ranks must divide the heads")


_NAMED_AS_LLAMA: Final = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "helium", "seed_oss"),
    *("gemma", "gemma2", "gemma3_text"),
)

_FAMILIES: Final[Mapping[str, Callable[[Any, Axis, _Borders], Mapping[str, Style]]]] = MappingProxyType(
    {
        **dict.fromkeys(_NAMED_AS_LLAMA, _llama),
        "phi3": _phi3,
        **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _moe),
        "gpt2": _gpt2,
        "gpt_neox": _gpt_neox,
    }
)
