"""The tensors that a rank stores of a stage, from a config alone: as `stretto.models` declares them, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

from stretto.arguments.schema import Arguments, ParallelConfig
from stretto.arguments.sections import A, B
from stretto.estimate.attention import attention_matrices
from stretto.estimate.parameters import joining, positions
from stretto.estimate.stages import stage_blocks
from stretto.layout.grouping import Stored
from stretto.schedule.blocks import StageBlock

VOCAB_MULTIPLE: Final = 8
"""Rows of a rank's part of the vocabulary come in multiples of so many."""

EMBEDDING: Final = "embedding"
"""The kind of what both ends of the model share."""

_Named = tuple[str, int, bool]
"""A stored tensor: the name of the first logical one in it, its elements, whether it decays."""


class _Placed(NamedTuple):
    """A stored tensor, the section that uses it first, and whether it is what both ends of the model share."""

    named: _Named
    section: int
    shared: bool


def trained_parameters(args: Arguments) -> int:
    """Of the whole model, those that have a gradient; vocabulary unpadded."""
    alone = replace(args, parallel=ParallelConfig())
    return sum(tensor.numel for tensor in stored_tensors(alone, 0, multiple=1) if tensor.kind[1])


def stored_tensors(args: Arguments, stage: int, *, multiple: int = VOCAB_MULTIPLE) -> list[Stored]:
    """What each tensor-parallel rank stores of a pipeline stage, padding included: all of them the same.

    Their kind says whether it is the embedding of both ends, which stands alone, or of experts; and whether it is
    trained. Those of GEMMs in FP8 with one scale are quantized where they are sharded.
    """
    found: list[Stored] = []
    for (name, numel, decayed), section, shared in _placed(args, stage, multiple):
        kind = EXPERT if _of_experts(name) else EMBEDDING if shared else ""
        quantized = args.run.fp8 == "tensorwise" and _of_gemms(name) and not _of_experts(name)
        found.append(Stored(numel, (kind, args.tuning.trains(name)), decayed, section, quantized))
    return found


def quantized_bytes(args: Arguments, stage: int, *, gathered: bool) -> int:
    """Bytes of a stage's weights in FP8, as they lie and transposed, with their scales in fp32; but for those with one
    scale where they are `gathered` so.

    Every matrix has the hidden size on one side. Experts have a scale for each row and column, in either recipe.
    """
    m, found = args.model, 0
    if args.run.fp8 == "none":
        return 0
    for (name, numel, _), *_ in _placed(args, stage, VOCAB_MULTIPLE):
        if not _of_gemms(name):
            continue
        stacked = m.experts // args.parallel.ep if _of_experts(name) else 1
        by_row = args.run.fp8 == "rowwise" or _of_experts(name)
        if by_row or not gathered:
            found += 2 * numel + 4 * (numel // m.hidden + stacked * m.hidden if by_row else 1)
    return found


def _placed(args: Arguments, stage: int, multiple: int) -> Iterator[_Placed]:
    """The tensors of a stage, in the order of the forward."""
    layers, m, tp = stage_blocks(args), args.model, args.parallel.tp
    first, last = stage == 0, stage == len(layers) - 1
    rows = -(-m.vocab_size // tp)
    vocab = -(-rows // multiple) * multiple * m.hidden
    embedding = "model.embed_tokens.weight", vocab, True
    if first:
        yield _Placed(embedding, 0, m.shared_embedding)
        if learned := positions(m, args.batch.seq_len):
            yield _Placed(("model.embed_positions.weight", learned * m.hidden, True), 0, False)
    for section, block in enumerate(layers[stage], int(first)):
        for named in _block(args, block):
            yield _Placed(named, section, False)
    if last:
        section = first + len(layers[stage])
        for named in _leading_out(args, vocab):
            yield _Placed(named, section, False)
        if m.shared_embedding and not first:
            yield _Placed(embedding, section, True)


def _leading_out(args: Arguments, vocab: int) -> Iterator[_Named]:
    """The tensors behind the last block, but for an embedding that is the head's."""
    m = args.model
    for n in m.further_layers:
        yield from _further(args, n)
    yield from _norm(args, "model.norm")
    if not m.tied:
        yield "lm_head.weight", vocab, True


def _of_gemms(name: str) -> bool:
    """Of the weights of GEMMs in FP8, which are called projections: routers, gates, adapters and the head are none."""
    return name.endswith("_proj.weight")


def _of_experts(name: str) -> bool:
    return ".experts." in name


def _block(args: Arguments, block: StageBlock) -> Iterator[_Named]:
    """The tensors of a block, as far as it is on a stage."""
    m, layer = args.model, f"model.layers.{block.layer}"
    before, after = m.norm_placement != "post", m.norm_placement != "pre"
    if block.attention:
        if before:
            yield from _norm(args, f"{layer}.input_layernorm")
        yield from (_latent if m.latent else _grouped)(args, f"{layer}.self_attn")
    # Before the feed-forward, or after attention: of that it has its name.
    if block.attention if after else block.feed_forward:
        yield from _norm(args, f"{layer}.post_attention_layernorm")
    if block.feed_forward:
        if before and after:
            yield from _norm(args, f"{layer}.pre_feedforward_layernorm")
        yield from _feed_forward(args, f"{layer}.mlp", sparse=m.is_sparse(block.layer))
        if after:
            yield from _norm(args, f"{layer}.post_feedforward_layernorm")


def _feed_forward(args: Arguments, mlp: str, *, sparse: bool) -> Iterator[_Named]:
    """The tensors of a feed-forward, dense or of experts."""
    m = args.model
    inner = m.dim_ffn // args.parallel.tp
    up = {"gate_proj": inner, "up_proj": inner} if m.gated else {"up_proj": inner}
    if sparse:
        yield from _experts(args, mlp)
    else:
        yield from _columns(args, mlp, up, biased=m.bias)
        yield from _rows(args, f"{mlp}.down_proj", inner)


def _further(args: Arguments, n: int) -> Iterator[_Named]:
    """The tensors of a block that predicts a further token, and of what leads into and out of it."""
    layer = f"model.layers.{n}"
    yield from _block(args, StageBlock(n))
    for name in ("enorm", "hnorm"):
        yield from _norm(args, f"{layer}.{name}")
    yield f"{layer}.eh_proj.weight", joining(args.model), True
    yield from _norm(args, f"{layer}.shared_head.norm")


def _grouped(args: Arguments, attention: str) -> Iterator[_Named]:
    """The tensors of attention with grouped queries."""
    m, tp, d = args.model, args.parallel.tp, args.model.dim_per_head
    q, kv = (m.heads // tp) * d, max(1, m.num_kv_heads // tp) * d
    yield from _columns(args, attention, {"q_proj": q, "k_proj": kv, "v_proj": kv}, biased=m.bias or m.qkv_bias)
    yield from _leaving(args, attention)
    if m.qk_norm:
        full = m.qk_norm_width == "full"
        yield f"{attention}.q_norm.weight", q if full else d, False
        yield f"{attention}.k_norm.weight", kv if full else d, False


def _latent(args: Arguments, attention: str) -> Iterator[_Named]:
    """The tensors of attention with latents: what makes them is whole on every rank, and stored as one."""
    m, tp = args.model, args.parallel.tp
    *made, up, _ = attention_matrices(m)
    low = [matrix for matrix in made if not matrix.cut]
    yield f"{attention}.{low[0].name}.weight", sum(matrix.numel for matrix in low), True
    if m.q_lora_rank is None:
        yield from _columns(args, attention, {"q_proj": m.heads // tp * m.dim_per_head}, biased=False)
    else:
        yield f"{attention}.q_a_layernorm.weight", m.q_lora_rank, False
        yield f"{attention}.q_b_proj.weight", made[-1].numel // tp, True
    yield f"{attention}.kv_a_layernorm.weight", up.columns, False
    yield f"{attention}.kv_b_proj.weight", up.numel // tp, True
    yield from _leaving(args, attention)


def _leaving(args: Arguments, attention: str) -> Iterator[_Named]:
    """What takes heads back to the residual stream, and their sinks."""
    heads = args.model.heads // args.parallel.tp
    yield from _rows(args, f"{attention}.o_proj", heads * args.model.dim_value)
    if args.model.attention_sinks:
        yield f"{attention}.sinks", heads, False


EXPERT: Final = "expert"
"""The kind of what is reduced and sharded over edp."""


def _experts(args: Arguments, mlp: str) -> Iterator[_Named]:
    """The tensors of a sparse feed-forward: router, experts, what all tokens go through."""
    m, p = args.model, args.parallel
    h, inner, up = m.hidden, m.dim_expert // p.etp * (m.experts // p.ep), 2 if m.gated else 1
    first = f"{mlp}.experts.0.{'gate' if m.gated else 'up'}_proj"
    yield f"{mlp}.gate.weight", m.experts * h, True
    if m.bias:
        yield f"{mlp}.gate.bias", m.experts, False
    yield f"{first}.weight", up * inner * h, True
    if m.bias:
        yield f"{first}.bias", up * inner, False
    yield f"{mlp}.experts.0.down_proj.weight", inner * h, True
    if m.bias:
        yield f"{mlp}.experts.0.down_proj.bias", m.experts // p.ep * h, False
    if m.shared_ffn:
        shared = m.shared_ffn // p.tp
        inward = {"gate_proj": shared, "up_proj": shared} if m.gated else {"up_proj": shared}
        yield from _columns(args, f"{mlp}.shared_expert", inward, biased=m.bias)
        yield from _rows(args, f"{mlp}.shared_expert.down_proj", shared)
        if m.shared_gate:
            yield f"{mlp}.shared_expert_gate.weight", h, True


def _columns(args: Arguments, module: str, parts: dict[str, int], *, biased: bool) -> Iterator[_Named]:
    """Matrices over the hidden size, stacked, of so many rows each; and their adapters."""
    h, r, first = args.model.hidden, args.tuning.lora_rank, next(iter(parts))
    yield f"{module}.{first}.weight", sum(parts.values()) * h, True
    if biased:
        yield f"{module}.{first}.bias", sum(parts.values()), False
    if adapted := [rows for name, rows in parts.items() if args.tuning.adapts(name)]:
        yield f"{module}.{first}.{A}", len(adapted) * r * h, True
        yield f"{module}.{first}.{B}", sum(adapted) * r, True


def _rows(args: Arguments, module: str, d_in: int) -> Iterator[_Named]:
    """A matrix from a rank's part of the features back to the hidden size; and its adapter."""
    h, r = args.model.hidden, args.tuning.lora_rank
    yield f"{module}.weight", h * d_in, True
    if args.model.bias:
        yield f"{module}.bias", h, False
    if args.tuning.adapts(module.rpartition(".")[2]):
        yield f"{module}.{A}", r * d_in, True
        yield f"{module}.{B}", h * r, True


def _norm(args: Arguments, name: str) -> Iterator[_Named]:
    yield f"{name}.weight", args.model.hidden, False
    if args.model.norm != "rms":
        yield f"{name}.bias", args.model.hidden, False
