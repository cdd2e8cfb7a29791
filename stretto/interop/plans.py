"""How the layers of common Hugging Face models are cut over tensor-parallel ranks, for `parallelize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from stretto.tensor_parallel.foreign import Plan
from stretto.tensor_parallel.foreign_layers import Around, Border, Colwise, Replicated, Rowwise, Style, Vocab
from stretto.world import Axis


def plan_of(model: nn.Module, axis: Axis, *, sequence_parallel: bool = False, gather_logits: bool = True) -> Plan:
    """The plan of a causal language model of transformers, by its `config`.

    Fewer key/value heads than ranks are held by several of them. Under `sequence_parallel` each rank has its part of
    the sequence between attention and feed-forward. Unless `gather_logits` they stay cut by words.

    Raises:
        ValueError: no plan for such models, or their query heads do not divide.
    """
    config: Any = getattr(model, "config", None)
    family = str(getattr(config, "model_type", None))
    if family not in _FAMILIES or not hasattr(model, "lm_head"):
        raise ValueError(
            f"no plan for {type(model).__name__} of model_type {family}; there are plans for the causal language models"
            f" {', '.join(_FAMILIES)}: say which of its layers are colwise, rowwise, vocab, replicated"
        )
    return _FAMILIES[family](config, axis, "sequence" if sequence_parallel else "whole", gather_logits)


def _llama(config: Any, axis: Axis, border: Border, gather: bool) -> Mapping[str, Style]:
    """Of all that have its names: Llama, Mistral, Qwen2, Qwen3 (norms of a head, which all heads share) and others."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    _require_heads(heads, axis)
    # With fewer key/value heads than ranks each rank has one, for all of its queries.
    groups = {"num_key_value_groups": heads // axis.size if axis.size > kv else heads // kv}
    inside: Border = "none" if border == "sequence" else "whole"
    own = Replicated(partial=border == "sequence")
    return {
        "model.embed_tokens": Vocab(),
        **({"model.layers.0": Around("part")} if border == "sequence" else {}),
        "*.self_attn": Around("whole" if border == "sequence" else "as it comes", groups),
        "*.self_attn.q_proj": Colwise(heads, border=inside),
        "*.self_attn.[kv]_proj": Colwise(kv, copied=True, border=inside),
        "*.self_attn.o_proj": Rowwise(heads, border=border),
        **({"*.self_attn.[qk]_norm": Replicated(partial=True)} if config.model_type == "qwen3" else {}),
        **({"*.mlp": Around("whole")} if border == "sequence" else {}),
        "*.mlp.gate_proj": Colwise(border=inside),
        "*.mlp.up_proj": Colwise(border=inside),
        "*.mlp.down_proj": Rowwise(border=border),
        "*norm": own,
        "lm_head": Vocab(gather, border=border),
    }


def _gpt_neox(config: Any, axis: Axis, border: Border, gather: bool) -> Mapping[str, Style]:
    """Queries, keys and values of each head stand together in one matrix, so it is cut between heads."""
    heads = config.num_attention_heads
    _require_heads(heads, axis)
    inside: Border = "none" if border == "sequence" else "whole"
    whole = {"*.attention": Around("whole"), "*.mlp": Around("whole")} if border == "sequence" else {}
    return {
        "gpt_neox.embed_in": Vocab(),
        **({"gpt_neox.layers.0": Around("part")} if border == "sequence" else {}),
        **whole,
        "*.attention.query_key_value": Colwise(heads, border=inside),
        "*.attention.dense": Rowwise(heads, border=border),
        "*.dense_h_to_4h": Colwise(border=inside),
        "*.dense_4h_to_h": Rowwise(border=border),
        "*norm": Replicated(partial=border == "sequence"),
        "lm_head": Vocab(gather, border=border),
    }


def _require_heads(heads: int, axis: Axis) -> None:
    if heads % axis.size:
        raise ValueError(f"{heads} attention heads over {axis.name}={axis.size} ranks: the ranks must divide the heads")


_NAMED_AS_LLAMA: Final = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "helium", "seed_oss")

_FAMILIES: Final[Mapping[str, Callable[[Any, Axis, Border, bool], Mapping[str, Style]]]] = MappingProxyType(
    {**dict.fromkeys(_NAMED_AS_LLAMA, _llama), "gpt_neox": _gpt_neox}
)
