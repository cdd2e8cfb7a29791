"""How `stretto explain` says where the number of parameters comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stretto.arguments import Arguments
from stretto.arguments.model import ModelConfig
from stretto.estimate import count_parameters, norms_of_a_layer, positions


def equations(args: Arguments) -> Iterator[str]:
    """How the counts of parameters come about. `test_cli_explain.py` computes these equations."""
    m, learned = args.model, positions(args.model, args.batch.seq_len)
    p, norm = count_parameters(m, args.batch.seq_len), "hidden" if m.norm == "rms" else "2*hidden"
    sizes = {"vocab": m.vocab_size, "positions": learned, "ffn": m.dim_ffn, "expert_ffn": m.dim_expert}
    sizes |= {"kv_heads": m.num_kv_heads, "head_dim": m.dim_per_head}
    sizes |= {"rope_head_dim": m.dim_rotary, "v_head_dim": m.dim_value}

    def filled(text: str) -> str:
        """With numbers in the place of names: of a size that settings may leave open, else of the setting."""
        return re.sub("[a-z_]+", lambda name: str(int(sizes.get(name[0]) or getattr(m, name[0]))), text)

    layer = f"{_attention(m)} + {_feed_forward(m, 'ffn')} + {norms_of_a_layer(m)}*{norm}"
    if p.sparse < p.layers:
        yield f"a layer: {layer}"
        yield f"       = {filled(layer)} = {p.layer:,}"
    if p.sparse:
        dense, experts = _feed_forward(m, "ffn"), f"experts*(hidden + {_feed_forward(m, 'expert_ffn')})"
        experts += f" + {_feed_forward(m, 'shared_ffn')} + hidden*shared_gate" if m.shared_ffn else ""
        experts += " + experts" if m.router_bias else ""
        experts += " + experts" if m.bias else ""
        yield f"a layer with experts: a layer - feed-forward + {experts}"
        yield (
            f"       = {p.layer} - ({filled(dense)}) + {filled(experts)} = {p.sparse_layer:,}, "
            f"of which a token goes through {p.sparse_layer - p.idle:,}; {p.sparse} of {p.layers} layers"
        )
    embedding = "vocab*hidden" + (" + positions*hidden" if learned else "")
    yield f"embedding: {embedding} = {filled(embedding)} = {p.embedding:,}"
    head = "the embedding again" if m.tied else f"vocab*hidden = {filled('vocab*hidden')} = {p.head:,}"
    yield f"head: {head}; norm: {norm} = {filled(norm)} = {p.final_norm:,}"
    if m.mtp_layers:
        block, rest = p.sparse_layer if p.further_sparse else p.layer, f"2*hidden*hidden + 3*{norm}"
        further = f"{filled('mtp_layers')}*({block} + {filled(rest)}) = {p.further:,}"
        yield f"multi-token prediction: mtp_layers*(a layer + {rest}) = {further}"


def _attention(m: ModelConfig) -> str:
    """Projections, their biases, and the norms and sinks of heads."""
    if m.latent:
        text = "q_lora_rank*(hidden + heads*head_dim + 1)" if m.q_lora_rank else "heads*head_dim*hidden"
        text += " + (kv_lora_rank + rope_head_dim)*hidden"
        text += " + kv_lora_rank*(heads*(head_dim - rope_head_dim + v_head_dim) + 1) + heads*v_head_dim*hidden"
    else:
        text = "2*heads*head_dim*hidden + 2*kv_heads*head_dim*hidden"
    if m.bias or m.qkv_bias:
        text += " + (heads + 2*kv_heads)*head_dim" + " + hidden" * m.bias
    if m.qk_norm:
        text += " + (heads + kv_heads)*head_dim" if m.qk_norm_width == "full" else " + 2*head_dim"
    return text + " + heads" * m.attention_sinks


def _feed_forward(m: ModelConfig, width: str) -> str:
    """Two matrices or three, each with its bias where there are any."""
    matrices = 3 if m.gated else 2
    return f"{matrices}*hidden*{width}" + f" + {matrices - 1}*{width} + hidden" * m.bias
