"""What the arguments say of process groups reaches those that lie along the axis."""

from __future__ import annotations

from typing import get_args

import pytest

from stretto.arguments import Resolved, parse
from stretto.arguments.schema import AxisName
from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, default_axes
from stretto.train.groups import group_options

pytestmark = pytest.mark.gloo


def resolve(words: str) -> Resolved:
    return parse(["--preset", "tiny", *words.split()], env={})


def options(words: str) -> dict[str, GroupOptions]:
    run = resolve(words)
    return group_options(run.args, run.layout)


def test_the_axes_to_name_are_those_that_have_groups() -> None:
    """A channel, as in pp:0>1, has the options of its axis."""
    assert set(get_args(AxisName)) == {"-".join(a) for a in default_axes(Layout.of()) if ":" not in a[0]}


def test_nothing_said_is_nothing_chosen() -> None:
    assert options("--tp 2 --dp 2") == {}


def test_dp_is_also_the_groups_that_gradients_are_reduced_over() -> None:
    said = options("--tp 2 --dp 2 --timeouts dp=60")
    assert said == dict.fromkeys(("dp", "dp-cp", "pp-dp-cp"), GroupOptions(timeout=60))


def test_an_option_of_the_pipeline_is_that_of_both_directions() -> None:
    said = options(
        "--pp 2 --dp 2 --layers 4 --device cuda --sharding none --no-pp-copy-engines "
        "--high-priority pp --max-ctas pp=4,dp=8 --min-ctas dp=2"
    )
    assert said["pp"] == said["pp:0>1"] == said["pp:1>0"] == GroupOptions(high_priority=True, max_ctas=4)
    assert said["dp"] == said["dp-cp"] == GroupOptions(min_ctas=2, max_ctas=8)


def test_messages_of_a_pipeline_go_by_copy_engines_on_gpus() -> None:
    """Both ways by what the pair of an earlier and a later place has, so that slots are there once."""
    words = "--pp 3 --vpp 2 --schedule interleaved --layers 6 --dp 1 --device cuda --sharding none --dtype bf16"
    words += " --seq-len 64 --micro-batch 2 --hidden 96"
    pairs = ("pp:0>1", "pp:1>2", "pp:0>2")
    assert options(words) == dict.fromkeys(pairs, GroupOptions(peer_messages=64 * 2 * 96 * 2))
    assert options(f"{words} --no-pp-copy-engines") == {}
    assert options(f"{words} --gloo pp")["pp:0>1"] == GroupOptions(backend="gloo")


def test_gathers_of_tensor_parallelism_have_a_window_on_gpus() -> None:
    """As large as what a rank reads of another: its part of the sequence."""
    words = "--tp 2 --dp 2 --device cuda --sharding none --dtype bf16 --seq-len 64 --micro-batch 2 --hidden 96"
    size = 64 // 2 * 2 * 96 * 2
    assert options(f"{words} --sequence-parallel") == dict.fromkeys(("tp", "tp-pp"), GroupOptions(peer_buffer=size))
    for without in ("", "--sequence-parallel --no-tp-comm-overlap"):
        assert options(f"{words} {without}") == {}
    assert options(f"{words} --sequence-parallel --gloo tp")["tp"] == GroupOptions(backend="gloo")


def test_keys_of_context_parallelism_have_a_buffer_of_their_own_on_gpus() -> None:
    """Not the groups of the same ranks that gradients go over; nor where keys go from rank to rank."""
    words = "--cp 2 --dp 1 --device cuda --sharding none --dtype bf16 --seq-len 64 --micro-batch 2 --kv-heads 2"
    words += " --head-dim 8"
    assert options(f"{words} --cp-comm all-gather") == {"cp": GroupOptions(peer_buffer=64 // 2 * 2 * 2 * 2 * 8 * 2)}
    assert options(f"{words} --cp-comm ring") == {}


def test_what_cp_alone_shares_lies_in_memory_that_all_read() -> None:
    """Not on the group that keys go over."""
    said = options("--cp 2 --dp 1 --device cuda --sharding zero1 --cp-comm ring")
    axes = ("dp-cp", "dp:gather-cp", "pp-dp-cp", "tp-cp-dp-pp")
    assert said == dict.fromkeys(axes, GroupOptions(peer_memory=True))


def test_gloo_in_place_of_nccl_for_one_axis() -> None:
    said = options("--tp 2 --dp 2 --device cuda --gloo dp")
    assert said["dp-cp"] == GroupOptions(backend="gloo")
    assert "tp" not in said
