"""`config.json`: what is understood, what is named as not supported, and the way back.

Faults to catch: a field that nobody reads passed over; a number beyond every model's taken; a window of a family that
switches it off; a stretch of the local wavelengths of Gemma 3; a setting of a family that one of
its models does not use; layers that a file names dense, written as each n-th.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.arguments import ConfigError, resolve
from stretto.arguments.layers import Layer
from stretto.arguments.model import ModelConfig
from stretto.arguments.sources import COMMAND_LINE
from stretto.cli.adopt import adopted
from stretto.interop.config import LIMIT, read_config, understand
from stretto.interop.errors import InteropError
from stretto.interop.families import FAMILIES
from stretto.interop.write import write_config

pytestmark = pytest.mark.pure

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 128,
}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 8, "sliding_window": 16}
NEOX = {**LLAMA, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 500}


def model(directory: Path, **fields: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(fields))
    return read_config(directory).model


SPARSE = {**LLAMA, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
SPARSE |= {"first_k_dense_replace": 1, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    "fields",
    [
        {**SPARSE, "model_type": "glm4_moe", "n_group": 1, "topk_group": 1},  # GLM-4.5
        {**SPARSE, "model_type": "deepseek_v3", "n_group": 1, "topk_group": 1, "qk_nope_head_dim": 4},  # Kimi K2
        {**LLAMA, "model_type": "qwen2_moe", "num_experts": 4, "shared_expert_intermediate_size": 0},
    ],
    ids=lambda fields: fields["model_type"],
)
def test_what_a_family_says_of_all_its_models_is_wrong_of_none(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Groups are ranked by two experts, where there are groups; a run that begins with one is not rejected for that."""
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4}
    fields = fields | (latent if fields["model_type"] == "deepseek_v3" else {})
    (tmp_path / "config.json").write_text(json.dumps(fields))
    said = adopted(str(tmp_path))
    assert not said.violations
    resolve([said, Layer(COMMAND_LINE, {"data.tokenizer": "byte"})])


def test_a_model_that_cannot_be_read_is_all_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mixtral", "new": 1}))
    with pytest.raises(ConfigError) as wrong:
        resolve([adopted(str(tmp_path)), Layer(COMMAND_LINE, {"parallel.ep": 2, "run.nproc": 2})])
    assert [each.rule for each in wrong.value.violations] == ["init_from"]


def test_the_forms_of_former_years(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` beside each other, `rotary_pct`, and the pattern of Gemma 3."""
    stretched = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = model(tmp_path, **LLAMA, rope_theta=5e5, rope_scaling=stretched | {"original_max_position_embeddings": 64})
    assert (found.rope_base, found.rope_scaling, found.rope_original_positions) == (5e5, "llama3", 64)
    long = {"type": "su", "short_factor": [1.0, 2], "long_factor": [3.0, 4.0]}
    phi = {**LLAMA, "model_type": "phi3", "original_max_position_embeddings": 32, "partial_rotary_factor": 0.5}
    found = model(tmp_path, **phi, rope_scaling=long)
    assert (found.rope_scaling, found.rope_original_positions, found.rope_factor) == ("longrope", 32, 4.0)
    assert (found.rope_short_factors, found.rope_long_factors) == ((1.0, 2.0), (3.0, 4.0))
    found = model(tmp_path, **NEOX)
    assert (found.rope_share, found.rope_base, found.parallel_residual, found.activation) == (0.5, 500, True, "gelu")
    found = model(tmp_path, **GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert (found.rope_base, found.rope_local_base, found.rope_factor) == (1e6, 1e4, 8.0)
    assert (found.window, found.global_layers, found.tied, found.head_dim) == (16, (5,), True, 8)


def test_what_published_files_have_besides(tmp_path: Path) -> None:
    """Fields that change nothing, as files of Qwen2.5, SmolLM2, Gemma 2 and 3, and Pythia have them."""
    model(tmp_path, **{**LLAMA, "model_type": "qwen2"}, use_mrope=False, torch_dtype="bfloat16")
    model(
        tmp_path, **LLAMA, rope_interleaved=False, is_llama_config=True, **{"transformers.js_config": {"dtype": "q4"}}
    )
    gemma2 = {**LLAMA, "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
    model(tmp_path, **gemma2, sliding_window=8, sliding_window_size=8)
    model(tmp_path, **GEMMA3, sliding_window_pattern=6, _attn_implementation_autoset=True)
    model(tmp_path, **NEOX, attention_probs_dropout_prob=0, hidden_dropout_prob=0)
    for fields in ({"use_mrope": True}, {"rope_interleaved": True}, {"sliding_window_size": 4}):
        with pytest.raises(InteropError, match=next(iter(fields))):
            model(tmp_path, **LLAMA, **fields)


def test_a_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 1}
    assert model(tmp_path, **qwen, use_sliding_window=False).window is None
    found = model(tmp_path, **qwen, use_sliding_window=True)
    assert (found.window, found.global_layers) == (4096, (0,))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"frobnicate": 3}, "'frobnicate' = 3: unknown"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantized"),
        ({"attention_bias": True}, "attention_bias = True with mlp_bias = False"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2: must be 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be a whole number from 1 to 4,096"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"vocab_size": None}, "vocab_size = None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"rms_norm_eps": "1"}, "rms_norm_eps = '1'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "short_factor = None: must be a list of numbers"),
        ({"rope_scaling": {"type": "proportional", "factor": 2}}, "rope_type = 'proportional'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0.7}}, "mscale"),
        ({"rope_scaling": [1]}, "rope_scaling = [1]: must be a table"),
        ({"rope_theta": -1}, "rope_theta = -1"),
        ({"num_attention_heads": 5}, "hidden_size = 32 is not a multiple of num_attention_heads = 5"),
        ({"model_type": "dbrx"}, "model_type = 'dbrx' is not supported"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0, -1]},
            "mlp_only_layers = [0, -1]: must be a list of layers",
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers = 3: must be a list of layers"),
        ({"model_type": "olmoe", "clip_qkv": -1}, "clip_qkv = -1: must be a number above 0"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InteropError) as raised:
        model(tmp_path, **{**LLAMA, **fields})
    assert named in str(raised.value)


def test_layers_that_are_named_dense_may_be_named_twice_or_not_be_there(tmp_path: Path) -> None:
    """As the code of transformers takes them."""
    found = model(tmp_path, **{**LLAMA, "model_type": "qwen3_moe", "mlp_only_layers": [2, 9, 0, 2]})
    assert found.dense_layers == (0, 2)
    assert [found.is_sparse(n) for n in range(3)] == [False, True, False]
    assert model(tmp_path, **{**LLAMA, "model_type": "qwen3_moe", "mlp_only_layers": None}).dense_layers == ()


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InteropError) as raised:
        model(tmp_path, **{**LLAMA, "one": 1, "two": 2, "hidden_act": "relu", "vocab_size": -1})
    assert len(raised.value.reasons) == 3


def test_what_is_no_json_object_of_a_sane_size_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in (b"", b"[]", b"\xff", b"[" * 100_000, b" " * (LIMIT + 1)):
        path.write_bytes(content)
        with pytest.raises(InteropError, match=r"config\.json"):
            read_config(tmp_path)
    path.unlink()
    with pytest.raises(InteropError, match="No such file"):
        read_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ROPE = st.dictionaries(
    st.sampled_from(["rope_type", "type", "rope_theta", "factor", "short_factor", "long_factor", "beta_fast"]),
    JSON | st.sampled_from(["default", "yarn", "longrope", "dynamic", "llama3"]),
)
NAMES = st.sampled_from(sorted({name for f in FAMILIES.values() for name in f.fields} | {"layer_types", "head_dim"}))
SPECIAL = st.sampled_from(
    ["rope_parameters", "rope_scaling", "sliding_window", "max_position_embeddings", "hidden_act"]
)


@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(NAMES | SPECIAL, JSON | ROPE, max_size=4))
def test_whatever_stands_in_a_file_is_a_model_or_rejected(family: str, fields: dict[str, Any]) -> None:
    """Catches: a number that no float holds, a list where a name belongs."""
    raw = json.loads(json.dumps({**LLAMA, "n_layer": 2, "n_embd": 8, "n_head": 2, "model_type": family, **fields}))
    known = {name: x for name, x in raw.items() if family != "gpt2" or name in fields or name.startswith(("n_", "v"))}
    with suppress(InteropError):
        understand(known, FAMILIES[family], "config.json")


def test_dropout_is_told_of_and_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "attention_dropout": 0.1}))
    found = read_config(tmp_path)
    assert found.model.dropout == 0
    assert found.notes == ("attention_dropout = 0.1 is not taken over: say --dropout for this run",)


_LISTED: dict[str, Any] = {"vocab": 61, "experts": 8, "qk_norm": True}
_LATENT: dict[str, Any] = {"vocab": 61, "experts": 8, "kv_lora_rank": 16, "router": "sigmoid", "router_bias": True}
SHAPES = [
    ("llama", ModelConfig(vocab=61, tied=True, rope_scaling="llama3", rope_factor=8.0, rope_original_positions=64)),
    ("llama", ModelConfig(vocab=61, bias=True, activation="geglu-tanh")),
    ("mistral", ModelConfig(vocab=61, window=7, head_dim=48)),
    ("qwen2", ModelConfig(vocab=61, qkv_bias=True)),
    ("qwen2", ModelConfig(vocab=61, qkv_bias=True, window=9, global_layers=(0, 1))),
    ("qwen3", ModelConfig(vocab=61, qk_norm=True, kv_heads=2, rope_scaling="dynamic", rope_original_positions=64)),
    ("gpt2", ModelConfig(vocab=61, norm="layer", bias=True, position="learned", activation="gelu-tanh", tied=True)),
    ("gpt_neox", ModelConfig(vocab=61, norm="layer", bias=True, activation="gelu", parallel_residual=True)),
    (
        "phi3",
        ModelConfig(
            vocab=61,
            rope_share=0.25,
            rope_scaling="longrope",
            rope_factor=2.0,
            rope_original_positions=64,
            rope_short_factors=(1.0, 1.0, 1.5, 2.0),
            rope_long_factors=(1.0, 2.0, 3.0, 4.5),
        ),
    ),
    ("olmo2", ModelConfig(vocab=61, norm_placement="post", qk_norm=True, qk_norm_width="full")),
    ("qwen3_moe", ModelConfig(**_LISTED, dense_layers=(0, 3))),
    ("qwen3_moe", ModelConfig(**_LISTED, first_dense=1, sparse_every=2)),
    ("olmoe", ModelConfig(**_LISTED, qk_norm_width="full", expert_ffn=704, qkv_clip=8.0)),
    ("deepseek_v3", ModelConfig(**_LATENT, dense_layers=(1, 0))),
]


@pytest.mark.parametrize(("family", "config"), SHAPES)
def test_a_model_of_ours_finds_its_family(family: str, config: ModelConfig) -> None:
    found = write_config(config, seq_len=64, dtype="bfloat16")
    assert found.family.model_type == family
    assert found.raw["dtype"] == "bfloat16"


def test_softmax_over_the_chosen_is_softmax_renormalized() -> None:
    """Catches: the usual router of Megatron-LM, of which no family with experts would have the shape."""
    model = ModelConfig(vocab=61, experts=8, expert_ffn=32, qk_norm=True, router="softmax-top-k")
    found = write_config(model, seq_len=64, dtype="float32")
    assert (found.raw["model_type"], found.raw["norm_topk_prob"]) == ("qwen3_moe", True)


def test_a_shape_of_no_family_says_what_stands_against_each() -> None:
    with pytest.raises(InteropError) as raised:
        write_config(ModelConfig(vocab=61, norm="layer"), seq_len=64, dtype="float32")
    assert "llama: norm = layer, not rms" in raised.value.reasons


def test_a_directory_of_a_run_is_no_model(tmp_path: Path) -> None:
    """Catches: 'no such file', to somebody who starts from what another run has trained."""
    with pytest.raises(InteropError, match="cannot read") as raised:
        read_config(tmp_path)
    assert "stretto export" not in str(raised.value)
    (tmp_path / "resolved.toml").touch()
    with pytest.raises(InteropError, match=r"it is of a run: go on with it by --resume, or .* `stretto export`"):
        read_config(tmp_path)


def test_a_file_without_a_family_says_so(tmp_path: Path) -> None:
    """Catches: a family named None that is not supported."""
    with pytest.raises(InteropError, match=r"config\.json has no model_type: it must be one of llama, "):
        model(tmp_path, **{name: value for name, value in LLAMA.items() if name != "model_type"})
