"""How `stretto explain` says where the number of parameters comes from."""

from __future__ import annotations

from collections.abc import Iterator

from stretto.arguments import Arguments
from stretto.arguments.model import ModelConfig
from stretto.estimate import count_parameters, norms_of_a_layer, positions, qk_norms


def equations(args: Arguments) -> Iterator[str]:
    """How the counts of parameters come about. `test_cli_explain.py` computes these equations."""
    m, p = args.model, count_parameters(args.model, args.batch.seq_len)
    h, d, inner, biased = m.hidden, m.dim_per_head, m.dim_ffn, m.bias or m.qkv_bias
    matrices, norms = 3 if m.gated else 2, norms_of_a_layer(m)
    norm, per_norm = (f"{h}", "hidden") if m.norm == "rms" else (f"2*{h}", "2*hidden")
    attention = (
        "2*heads*head_dim*hidden + 2*kv_heads*head_dim*hidden",
        f"2*{m.heads}*{d}*{h} + 2*{m.num_kv_heads}*{d}*{h}",
    )
    if m.latent:
        attention = _latent(m)
    named = [f"{attention[0]} + {matrices}*hidden*ffn + {norms}*{per_norm}"]
    terms = [f"{attention[1]} + {matrices}*{h}*{inner} + {norms}*{norm}"]
    if biased:
        named.append("(heads + 2*kv_heads)*head_dim")
        terms.append(f"({m.heads} + 2*{m.num_kv_heads})*{d}")
    if m.bias:
        named.append(f"2*hidden + {matrices - 1}*ffn")
        terms.append(f"2*{h} + {matrices - 1}*{inner}")
    if m.qk_norm:
        full = m.qk_norm_width == "full"
        named.append("(heads + kv_heads)*head_dim" if full else "2*head_dim")
        terms.append(f"{qk_norms(m) // d}*{d}")
    if m.attention_sinks:
        named.append("heads")
        terms.append(f"{m.heads}")
    if p.sparse < p.layers:
        yield f"a layer: {' + '.join(named)}"
        yield f"       = {' + '.join(terms)} = {p.layer:,}"
    if p.sparse:
        of_bias = (matrices - 1) * inner + h if m.bias else 0
        rest, outside = p.layer - matrices * h * inner - of_bias, "a layer - feed-forward"
        beside = f" + {matrices}*{h}*{m.shared_ffn} + {h}*{int(m.shared_gate)}" if m.shared_ffn else ""
        beside += f" + {matrices - 1}*{m.shared_ffn} + {h}" if m.shared_ffn and m.bias else ""
        own = f" + {m.experts}" if m.router_bias else ""
        own += f" + {m.experts}*(1 + {matrices - 1}*{m.dim_expert} + {h})" if m.bias else ""
        yield (
            f"a layer with experts: {outside} + experts*(hidden + {matrices}*hidden*expert_ffn)"
            + (f" + {matrices}*hidden*shared_ffn + hidden*shared_gate" if m.shared_ffn else "")
            + (" + experts (router_bias)" if m.router_bias else "")
            + (" + biases" if m.bias else "")
        )
        yield (
            f"       = {rest} + {m.experts}*({h} + {matrices}*{h}*{m.dim_expert}){beside}{own} = {p.sparse_layer:,}, "
            f"of which a token goes through {p.sparse_layer - p.idle:,}; {p.sparse} of {p.layers} layers"
        )
    learned = positions(m, args.batch.seq_len)
    places = (" + positions*hidden", f" + {learned}*{h}") if learned else ("", "")
    yield f"embedding: vocab*hidden{places[0]} = {m.vocab_size}*{h}{places[1]} = {p.embedding:,}"
    head = "the embedding again" if m.tied else f"vocab*hidden = {m.vocab_size}*{h} = {p.head:,}"
    yield f"head: {head}; norm: {per_norm} = {norm} = {p.final_norm:,}"


def _latent(m: ModelConfig) -> tuple[str, str]:
    """Attention with latents, in names and in numbers."""
    h, d, r, v, kv, q = m.hidden, m.dim_per_head, m.dim_rotary, m.dim_value, m.kv_lora_rank, m.q_lora_rank
    named = "heads*head_dim*hidden"
    terms = f"{m.heads}*{d}*{h}"
    if q:
        named = "q_lora_rank*(hidden + heads*head_dim + 1)"
        terms = f"{q}*({h} + {m.heads}*{d} + 1)"
    named += " + (kv_lora_rank + rope_head_dim)*hidden"
    named += " + kv_lora_rank*(heads*(head_dim - rope_head_dim + v_head_dim) + 1) + heads*v_head_dim*hidden"
    terms += f" + ({kv} + {r})*{h} + {kv}*({m.heads}*({d} - {r} + {v}) + 1) + {m.heads}*{v}*{h}"
    return named, terms
