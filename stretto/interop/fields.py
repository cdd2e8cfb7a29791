"""Fields of a `config.json` of any family that become no setting of ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

NEUTRAL: Final = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initial_context_length",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "n_ctx",
        "output_attentions",
        "output_router_logits",
        "output_hidden_states",
        "output_past",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "use_cache",
        "cache_implementation",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "original_max_position_embeddings",
    ]
)
"""Fields that say nothing of what the model computes in training."""

TRAINING: Final = frozenset(
    [
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "classifier_dropout",
        "embd_pdrop",
        "hidden_dropout",
        "hidden_dropout_prob",
        "resid_pdrop",
    ]
)
"""Chances of dropout. They are not of the model but of whoever trained it: the run says its own."""

ONLY: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"rope_interleaved": (False,), "use_mrope": (False,)})
"""Fields that files of any family may have, with the values that change nothing."""
