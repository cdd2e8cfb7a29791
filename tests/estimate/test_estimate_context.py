"""What `auto` goes by: bytes as the papers count them, and the way that costs least."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig, RunConfig
from stretto.estimate.context import comm_of, exchanged
from stretto.estimate.memory import ledger
from stretto.estimate.moments import stage_activations

pytestmark = pytest.mark.pure


def arguments(cp: int, seq_len: int, *, heads: int = 32, kv_heads: int = 8, node: int = 8) -> Arguments:
    """Llama 3 8B's attention in bf16."""
    return Arguments(
        model=ModelConfig(layers=2, hidden=4096, heads=heads, kv_heads=kv_heads, head_dim=128, ffn=14336, vocab=128256),
        parallel=ParallelConfig(cp=cp, dp=1, gpus_per_node=node),
        batch=BatchConfig(seq_len=seq_len, micro_batch=1, global_batch=1),
        run=RunConfig(dtype="bf16", device="cuda"),
    )


def test_bytes_of_a_layer_are_those_of_the_papers() -> None:
    """128k tokens over 8 ranks: keys and values of 7 others, twice in bf16, their gradients in fp32; or all heads."""
    args = arguments(8, 131072)
    block = 16384 * 8 * 128 * 2
    assert exchanged(args, "all-gather").bytes == exchanged(args, "ring").bytes == 7 * block * (2 * 2 + 4)
    assert exchanged(args, "ulysses").bytes == 2 * 2 * 16384 * 128 * (2 * 32 + 2 * 8) * 7 // 8


@given(st.sampled_from([2, 3, 4, 8, 16]), st.integers(10, 20), st.sampled_from([2, 8, 16]))
def test_auto_takes_what_costs_least_of_what_can_be(cp: int, power: int, node: int) -> None:
    args = arguments(cp, 2**power, node=node)
    chosen = comm_of(args, 0)
    assert chosen != "ulysses" or 32 % cp == 0
    assert exchanged(args, chosen).seconds <= min(exchanged(args, way).seconds for way in ("all-gather", "ring"))


def test_a_ring_is_hidden_behind_attention_of_long_sequences_across_nodes() -> None:
    assert comm_of(arguments(8, 524288, node=2), 0) == "ring"


def test_what_is_needed_is_less_of_documents_and_of_windows_and_auto_knows() -> None:
    """A window of 4,096 before each of two blocks, of 7 times 16,384 keys; of one document the last queries see all."""
    plain = arguments(8, 131072, node=2)
    windowed = replace(plain, model=replace(plain.model, window=4096))
    packed = replace(windowed, data=replace(plain.data, packing=True))
    whole = exchanged(plain, "all-gather").bytes
    assert exchanged(plain, "needed").bytes == whole
    assert exchanged(windowed, "needed").bytes == whole * 2 * 4095 // (7 * 16384)
    assert exchanged(replace(packed, model=plain.model), "needed").bytes == whole // 2
    assert [comm_of(args, 0) for args in (plain, windowed, packed)] == ["ring", "needed", "needed"]


def test_a_gather_is_hidden_behind_the_squares_as_it_was_measured() -> None:
    """On two GPUs of a node an all-gather was the quickest way (docs/context_parallel.md)."""
    for length in (32768, 131072):
        args = arguments(2, length)
        assert comm_of(args, 0) == "all-gather"
        assert comm_of(replace(args, data=replace(args.data, packing=True)), 0) == "all-gather"


def test_what_is_said_of_a_layer_is_done_in_it() -> None:
    args = arguments(2, 1024)
    args = replace(args, parallel=replace(args.parallel, cp_comm=("ring", "ulysses")))
    assert [comm_of(args, layer) for layer in range(2)] == ["ring", "ulysses"]
    further = replace(args, model=replace(args.model, mtp_layers=1))
    assert [comm_of(further, layer) for layer in range(3)] == ["ring", "ulysses", "ulysses"]
    assert ledger(further, 0).total > ledger(args, 0).total


def test_activations_of_a_rank_are_those_of_its_slots() -> None:
    """Half the tokens, but for the copy of keys and values, and for cosines and sines of tokens that are not a row."""
    whole, half = (stage_activations(arguments(cp, 8192), 0).kept for cp in (1, 2))
    keys, angles = 2 * 2 * 4096 * 2 * 8 * 128, 2 * 2 * 4096 * 128
    assert half == whole / 2 + keys + angles


def test_what_is_exchanged_counts_where_attention_is_most() -> None:
    """Of a block that is computed once more, with a narrow feed-forward."""
    args = arguments(2, 8192)
    args = replace(args, model=replace(args.model, ffn=64, vocab=64), run=replace(args.run, recompute="block"))
    assert ledger(args, 0).moment == "backward of attention"
