"""The tensors that a rank stores of a stage, from a config alone: as `stretto.models` declares them, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from stretto.arguments.schema import Arguments
from stretto.estimate.stages import stage_layers
from stretto.layout.grouping import Stored

VOCAB_MULTIPLE: Final = 8
"""Rows of a rank's part of the vocabulary come in multiples of so many."""


def stored_tensors(args: Arguments, stage: int) -> list[Stored]:
    """What each tensor-parallel rank stores of a pipeline stage, padding included: all of them the same."""
    layers, m, tp = stage_layers(args), args.model, args.parallel.tp
    first, last = stage == 0, stage == len(layers) - 1
    found: list[Stored] = []
    section = 0
    rows = -(-m.vocab_size // tp)
    vocab = -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE * m.hidden
    if first:
        found.append(Stored(vocab, ("embedding" if m.tied else "",), True, section))
        if m.position == "learned":
            found.append(Stored(args.batch.seq_len * m.hidden, ("",), True, section))
        section += 1
    for layer in layers[stage]:
        found += [Stored(numel, ("",), decayed, section) for numel, decayed in _attention(args)]
        if m.is_sparse(layer):
            found += [Stored(numel, (kind,), True, section) for numel, kind in _experts(args)]
        else:
            found += [Stored(numel, ("",), decayed, section) for numel, decayed in _feed_forward(args)]
        section += 1
    if last:
        found += [Stored(numel, ("",), False, section) for numel in _norm(args)]
        if not m.tied:
            found.append(Stored(vocab, ("",), True, section))
        elif not first:
            found.append(Stored(vocab, ("embedding",), True, section))
    return found


EXPERT: Final = "expert"
"""The kind of what is reduced and sharded over edp."""


def _experts(args: Arguments) -> Iterator[tuple[int, str]]:
    """Elements of each tensor of a sparse feed-forward, and their kind: router, experts, what all tokens go through."""
    m, p = args.model, args.parallel
    h, inner, up = m.hidden, m.dim_expert // p.etp * (m.experts // p.ep), 2 if m.gated else 1
    yield m.experts * h, ""
    yield up * inner * h, EXPERT
    yield inner * h, EXPERT
    if m.shared_ffn:
        yield up * m.shared_ffn // p.tp * h, ""
        yield m.shared_ffn // p.tp * h, ""
        if m.shared_gate:
            yield h, ""


def _attention(args: Arguments) -> Iterator[tuple[int, bool]]:
    """Elements of each tensor of a block but for its feed-forward, and whether it decays."""
    m, tp = args.model, args.parallel.tp
    h, d = m.hidden, m.dim_per_head
    qkv = (m.heads // tp + 2 * max(1, m.num_kv_heads // tp)) * d
    yield from ((numel, False) for numel in _norm(args))
    yield qkv * h, True
    if m.bias or m.qkv_bias:
        yield qkv, False
    yield h * (m.heads // tp) * d, True
    if m.bias:
        yield h, False
    if m.qk_norm:
        yield from ((d, False), (d, False))
    yield from ((numel, False) for numel in _norm(args))


def _feed_forward(args: Arguments) -> Iterator[tuple[int, bool]]:
    """The same of a dense feed-forward."""
    m, h, inner = args.model, args.model.hidden, args.model.dim_ffn // args.parallel.tp
    up = inner * (2 if m.gated else 1)
    yield up * h, True
    if m.bias:
        yield up, False
    yield h * inner, True
    if m.bias:
        yield h, False


def _norm(args: Arguments) -> tuple[int, ...]:
    return (args.model.hidden,) if args.model.norm == "rms" else (args.model.hidden, args.model.hidden)
