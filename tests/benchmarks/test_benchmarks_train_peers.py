"""The benchmark compares like with like: all peers start from the same weights and compute the same losses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.train.__main__ import main
from benchmarks.train.data import write_tokens
from benchmarks.train.memory import itemised
from benchmarks.train.peers import RunRejectedError, create
from benchmarks.train.peers.torch_async_tp import Fusions, use_symmetric_memory
from benchmarks.train.shapes import SHAPES, Job
from benchmarks.train.trace import step_of
from benchmarks.train.waterfall import Kernel
from stretto.world import World

pytestmark = pytest.mark.gloo

TORCH = {
    "one": ["torch"],
    "dp": ["torch", "torch-zero1", "torch-fsdp"],
    "tp": ["torch", "torch-eager"],
    "pp": ["torch", "torch-interleaved"],
}


def losses(world: World, name: str, job: Job) -> list[float]:
    peer = create(name)
    peer.setup(job, world)  # type: ignore[call-arg]
    found = [peer.step().item() for _ in range(3)]
    peer.close()
    return found


@pytest.mark.filterwarnings("default")  # torch's own modules warn of each other
@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [*((p, "fp32") for p in TORCH), ("one", "bf16"), pytest.param("tp", "bf16", marks=pytest.mark.nightly)],
)
def test_peers_lose_alike(pool, tmp_path, parallel, dtype):
    """Catches another initial value, batch or learning rate, no weight decay, no clipping, gradients not added up.

    The learning rate is large, so that the third loss tells of two updates.
    """
    write_tokens(tmp_path / "tokens", SHAPES["D0"])
    n = 1 if parallel == "one" else 2
    job = Job(SHAPES["D0"], parallel, n, "cpu", dtype, False, str(tmp_path / "tokens"), lr=1e-2)
    ours, *theirs = (
        [sum(ranks) for ranks in zip(*pool.run(n, losses, name, job), strict=True)]
        for name in ["stretto", *TORCH[parallel]]
    )
    assert abs(ours[2] - ours[1]) > 0.01
    for other in theirs:
        assert other == pytest.approx(ours, abs=5e-6 if dtype == "fp32" else 2e-3)


@pytest.mark.nightly  # it compiles
@pytest.mark.filterwarnings("default")
def test_blocks_of_tp_are_one_graph(pool, tmp_path):
    """Catches a collective at which the graph breaks: no compiler could fuse it, and the run would fail on GPUs."""
    write_tokens(tmp_path / "tokens", SHAPES["D0"])
    job = Job(SHAPES["D0"], "tp", 2, "cpu", "fp32", True, str(tmp_path / "tokens"), lr=1e-2)
    eager, compiled = (pool.run(2, losses, name, job, timeout=300)[0] for name in ("torch-eager", "torch"))
    assert compiled == pytest.approx(eager, abs=5e-6)


def test_asynchronous_tp_says_where_it_cannot_run_and_what_it_found():
    """Catches a peer that goes on without what it is called after, and a fused collective counted as one alone."""
    job = Job(SHAPES["D0"], "tp", 2, "cpu", "fp32", False, "")
    for own, why in ((replace(job, parallel="dp"), "as tp"), (job, "compiler")):
        with pytest.raises(RunRejectedError, match=why):
            create("torch-async-tp").setup(own, World.single())  # type: ignore[call-arg]
    with pytest.raises(RunRejectedError, match="of GPUs"):
        use_symmetric_memory("0", torch.device("cpu"))
    fusions, graph = Fusions(), torch.fx.Graph()
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        graph.call_function(getattr(torch.ops._c10d_functional, name).default)
    graph.call_function(torch.ops.symm_mem.fused_all_gather_matmul.default)
    fusions.options["post_grad_custom_post_pass"](graph)
    assert list(fusions.about().values()) == [1, 0, 1, 1]


def clipped(world: World) -> list[float]:
    peer = create("megatron-fsdp")
    peer.model = model = torch.nn.Linear(1, 1)  # type: ignore[attr-defined]
    own, gradient = (model.weight, 3.0) if world.rank == 0 else (model.bias, 4.0)
    own.grad = torch.full_like(own, gradient)
    peer._clip()  # type: ignore[attr-defined]
    return [0.0 if p.grad is None else p.grad.item() for p in (model.weight, model.bias)]


def test_a_rank_without_a_parameter_clips_with_the_others(pool):
    """megatron-fsdp cuts a block in the middle, so most parameters lie on one rank. Catches a norm of a rank's own
    gradients, and one that asks all ranks for each of its parameters, in which a rank without one does not join."""
    assert pool.run(2, clipped) == [pytest.approx([0.6, 0]), pytest.approx([0, 0.8])]


@pytest.mark.nightly
def test_the_command_measures_and_saves(tmp_path, capsys):
    """One run of the whole, and what cannot run is said and left out."""
    out = tmp_path / "found.json"
    words = "--shape D0 --device cpu --dtype fp32 --peers stretto,torch,nobody --steps 2 --warmup 2"
    code = main([*words.split(), "--ceiling-seconds", "0.001", "--out", str(out)])
    found = json.loads(out.read_text())
    assert code == 1, capsys.readouterr().out
    assert "nobody rejected: unknown peer" in found["peers"]["nobody"]["gone"]
    assert found["command"].startswith("python -m benchmarks.train --shape D0")
    for name in ("stretto", "torch"):
        peer = found["peers"][name]
        assert peer["ms"]["count"] == len(peer["all_ms"]) == 2
        assert peer["memory_bytes"][0]["optimizer"] >= 12 * SHAPES["D0"].parameters
    ours, theirs = (found["peers"][name]["loss_after_warmup"] for name in ("stretto", "torch"))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert sum(found["ceiling"]["items_ms"].values()) == pytest.approx(found["ceiling"]["step_ms"])


def test_memory_counts_what_is_saved_once(tmp_path):
    """In fp32 with no compiler: weights once, 12 bytes of state, and activations that grow with the tokens."""
    write_tokens(tmp_path / "tokens", SHAPES["D0"])
    peer = create("torch")
    peer.setup(Job(SHAPES["D0"], "one", 1, "cpu", "fp32", False, str(tmp_path / "tokens")), World.single())  # type: ignore[call-arg]
    peer.step()
    items = itemised(peer)
    weights = 4 * SHAPES["D0"].parameters
    assert items["weights"] == pytest.approx(weights, rel=0.05)
    assert items["optimizer"] == pytest.approx(3 * weights, rel=0.05)
    logits = 4 * SHAPES["D0"].micro_batch * SHAPES["D0"].seq_len * SHAPES["D0"].vocab
    assert logits < items["saved activations"] < 20 * logits
    assert torch.is_grad_enabled()


def test_memory_counts_weights_in_8_bits(tmp_path):
    """They live within a step alone: those of the blocks' matrices, as they lie and transposed, each with a scale."""
    write_tokens(tmp_path / "tokens", SHAPES["D0"])
    peer = create("stretto-fp8")
    peer.setup(Job(SHAPES["D0"], "one", 1, "cpu", "bf16", False, str(tmp_path / "tokens")), World.single())  # type: ignore[call-arg]
    shape = SHAPES["D0"]
    inside = shape.multiplied - shape.hidden * shape.vocab  # without the head
    assert itemised(peer)["weights in 8 bits"] == 2 * inside + 4 * 4 * shape.layers
    assert peer.held()["weights in 8 bits"] == []
    peer.close()


def test_a_kernel_belongs_to_the_step_that_launched_it():
    """Kernels run late: those of step 0 while the host is in step 1."""

    def event(cat: str, name: str, ts: float, dur: float, number: int = 0) -> dict[str, object]:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": number}}

    events = [
        event("user_annotation", "benchmarked step 0", 0, 10),
        event("user_annotation", "benchmarked step 1", 10, 10),
        event("cuda_runtime", "cudaLaunchKernel", 5, 1, 1),
        event("cuda_runtime", "cudaLaunchKernel", 15, 1, 2),
        event("kernel", "gemm", 11_000, 9_000, 1),
        event("kernel", "adam", 21_000, 4_000, 2),
    ]
    kernels, window = step_of(events, 1)
    assert kernels == [Kernel("adam", 21.0, 25.0)]
    assert window == (20.0, 25.0)
