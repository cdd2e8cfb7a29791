"""Graphs of microbatches: replayed, they are the eager step, to the bit.

Each test says which fault it catches; on a CPU a tape of torch's operations is in the place of the graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from graph_tape import Tape
from torch import Tensor

from stretto.arguments import parse
from stretto.batch import Batch
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import CudaGraphs, GraphedExecutor, Recorder
from stretto.pipeline_parallel.inputs import Inputs
from stretto.testing import Pool
from stretto.train.assemble import all_say
from stretto.train.build import peer_buffers
from stretto.verify import Session, build, random_batch, random_weights
from stretto.world import World

WORDS = "--preset demo --hidden 32 --heads 4 --kv-heads 2 --layers 2 --vocab 61 --seq-len 16 --tp 1 --pp 1"
WORDS += " --global-batch 6 --micro-batch 2 --nproc 1"
SPARSE = "--dtype bf16 --experts 8 --top-k 2 --expert-ffn 256 --balance-loss 0.01 --router-z-loss 0.001"
OTHER = "--activation gelu --norm layer --bias --qk-norm --position learned --tied"


Recorders = Callable[[ParallelState], Recorder]


def cuda_graphs(state: ParallelState) -> CudaGraphs:
    """As in a run."""
    return CudaGraphs(state.world.device, peer_buffers(state))


def graphed(session: Session, of: Recorders) -> GraphedExecutor:
    """The session's microbatches are replayed from its second step on."""
    recorder = of(session.state)
    session.state.before_close(recorder.clear)
    stepper = session.built.stepper
    plain = stepper.executor
    agreed = partial(all_say, session.state)
    made = GraphedExecutor(plain.program, plain.rank, plain.stages, plain.link, session.built.weights, recorder, agreed)
    stepper.executor = made
    return made


def trained(words: str, recorder: Recorders | None, layout: Layout, world: World, steps: int = 4) -> dict[str, Any]:
    """Losses, the last gradients, weights and moments; an evaluation follows each step."""
    args = parse([*WORDS.split(), *words.split()], files=False, world_size=world.size).args
    with build(args, layout, world) as session:
        session.load_full(random_weights(session, seed=0))
        executor = None if recorder is None else graphed(session, recorder)
        losses = []
        for step in range(steps):
            losses.append(torch.tensor(session.step(random_batch(args, seed=step))))
            losses.append(torch.tensor(session.evaluate(random_batch(args, seed=100 + step))))
        found: dict[str, Any] = {"losses": torch.stack([x.sum() for x in losses]), **session.full_state()}
        found |= {f"gradient of {name}": grad for name, grad in session.full_grads().items()}
        found["graphs"] = 0 if executor is None else executor.recorded
        return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of tensors that are not the same bits."""
    return [name for name, x in one.items() if isinstance(x, Tensor) and not torch.equal(x, other[name])]


@pytest.mark.gloo
@pytest.mark.parametrize(
    "words", ["--dropout 0.3 --recompute selective", f"{OTHER} --recompute block", "--ffn-chunks 2 --lora-rank 2"]
)
def test_replayed_microbatches_are_the_eager_ones(words: str) -> None:
    """Catches: inputs that are not copied to where the graph reads; later microbatches that set gradients as the first
    does; progress that a replay leaves as it was; a loss that the next replay overwrites; samples of a mask kept."""
    tape = Tape()
    eager, replayed = (trained(words, r, Layout.of(), World.single()) for r in (None, lambda _: tape))
    assert differing(eager, replayed) == []
    assert replayed["graphs"] == 2  # the first microbatch of a step, and the others
    assert tape.replays == 3 * 3


def _over_ranks(world: World, words: str) -> tuple[list[str], int]:
    eager, replayed = (trained(words, r, Layout.of(dp=2), world) for r in (None, lambda _: Tape()))
    return differing(eager, replayed), replayed["graphs"]


@pytest.mark.gloo
@pytest.mark.parametrize("sharding", ["none", "zero1"])
def test_the_last_backward_still_sends_its_gradients(pool: Any, sharding: str) -> None:
    """Catches: a last microbatch replayed, whose gradients leave before they are added; weights read on their way."""
    words = f"--global-batch 12 --dp 2 --nproc 2 --bucket-mb 0.01 --sharding {sharding}"
    assert pool.run(2, _over_ranks, words) == [([], 2)] * 2


def _over_tp(world: World, words: str, fails: int) -> tuple[list[str], int, int]:
    tape = Tape(fails if world.rank else 0)
    eager, replayed = (
        trained(f"--nproc 2 --tp 2 {words}", r, Layout.of(tp=2), world, 5) for r in (None, lambda _: tape)
    )
    return differing(eager, replayed), replayed["graphs"], tape.replays


@pytest.mark.gloo
@pytest.mark.parametrize("words", ["--dropout 0.3", f"{OTHER} --no-sequence-parallel --recompute selective"])
@pytest.mark.parametrize("fails", [0, 1])
def test_replayed_microbatches_meet_those_of_the_other_rank(pool: Any, words: str, fails: int) -> None:
    """Catches: a rank that replays what failed on another, which waits for it; collectives that are not replayed."""
    assert pool.run(2, _over_tp, words, fails) == [([], 2, 3 * (4 - fails))] * 2


@pytest.mark.gloo
@pytest.mark.parametrize("fails", [1, pytest.param(9, marks=pytest.mark.nightly)])
def test_a_recording_that_fails_is_made_up_for(fails: int, caplog: pytest.LogCaptureFixture) -> None:
    """Catches: gradients that count as there although nothing was computed; a graph that is kept beside newer ones; a
    failure in every step of a run."""
    with caplog.at_level(logging.WARNING):
        eager, replayed = (trained("", r, Layout.of(), World.single(), 6) for r in (None, lambda _: Tape(fails)))
    assert differing(eager, replayed) == []
    assert replayed["graphs"] == (2 if fails == 1 else 0)
    said = [r.getMessage() for r in caplog.records]
    assert said == ([] if fails == 1 else ["training without CUDA graphs: " + said[0].partition(": ")[2]])


@pytest.mark.gloo
def test_a_signature_is_of_shapes_and_of_what_the_host_has_seen() -> None:
    """Each alone. Catches: one that leaves shapes, dtypes, or what is no tensor out."""
    first = {"rows": torch.zeros(2, 3), "known": (4, None)}
    inputs = Inputs(first)
    assert inputs.put({"rows": torch.ones(2, 3), "known": (4, None)})
    assert inputs.tree["rows"].sum() == 6
    for other in (
        {"rows": torch.zeros(2, 2), "known": (4, None)},
        {"rows": torch.zeros(2, 3, dtype=torch.float64), "known": (4, None)},
        {"rows": torch.zeros(2, 3), "known": (5, None)},
        {"rows": torch.zeros(2, 3), "known": (4, torch.zeros(1))},
    ):
        assert not inputs.put(other)
        assert inputs.tree["rows"].shape == (2, 3)
        assert inputs.tree["rows"].sum() == 6


@pytest.mark.gloo
@pytest.mark.parametrize("what", ["shorter rows", "known otherwise"])
def test_another_signature_is_eager(what: str) -> None:
    """Catches: rows of another shape, or of the same shape and known otherwise, copied over those recorded."""
    args = parse(WORDS.split(), files=False).args

    def losses(recorder: Recorders | None) -> list[Any]:
        with build(args, Layout.of(), World.single()) as session:
            session.load_full(random_weights(session, seed=0))
            if recorder is not None:
                graphed(session, recorder)
            stepper = session.built.stepper
            found = []
            for step in range(4):
                microbatches = session.microbatches(random_batch(args, seed=step))
                short = microbatches[1]
                if step == 3 and what == "known otherwise":
                    given = None if short.structure is not None else short.known_structure
                    microbatches[1] = replace(short, structure=given)
                elif step == 3:  # in the middle
                    b = short.batch
                    batch = Batch(*(x[:, :9] for x in (b.tokens, b.labels, b.loss_mask)), b.samples)
                    microbatches[1] = replace(short, batch=batch, structure=None)
                found.append(stepper.step(microbatches, 1e-3))
            return [(r.loss.item(), r.grad_norm.item()) for r in found]

    tape = Tape()
    assert losses(None) == losses(lambda _: tape)
    assert tape.replays == 2 * 3 + 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "words",
    [
        "--dtype fp32 --no-compile --dropout 0.2 --recompute block",
        "--dtype bf16 --compile --recompute selective --qk-norm",
        "--dtype bf16 --no-compile --tied --activation gelu --norm layer --bias --qk-norm",
        "--dtype bf16 --compile --fp8 tensorwise",
        f"{SPARSE} --compile --recompute selective",
        f"{SPARSE} --compile --recompute block --router-bias --router sigmoid",
        f"{SPARSE} --compile --fp8 rowwise --first-dense 1 --shared-ffn 256",
    ],
)
def test_graphs_on_a_gpu_are_the_eager_step(words: str) -> None:
    """Catches: all of the above in a real graph; memory that two graphs share while one still reads it."""
    sizes = "--hidden 256 --heads 4 --kv-heads 2 --ffn 512 --layers 3 --vocab 1000 --seq-len 128 --micro-batch 2"
    words = f"{sizes} --global-batch 8 --device cuda --nproc 1 --no-cuda-graphs {words}"
    device = torch.device("cuda", 0)
    world = World.single(device)
    require_same(*(trained(words, r, Layout.of(), world, 5) for r in (None, None, cuda_graphs)), words)


def require_same(one: dict[str, Any], again: dict[str, Any], replayed: dict[str, Any], words: str) -> None:
    """Replayed steps differ from eager ones no more than those among themselves."""
    assert replayed["graphs"] == 2
    worst = {}
    for name, x in one.items():
        if isinstance(x, Tensor):
            size = x.double().norm().item() or 1.0
            worst[name] = tuple((x.double() - y[name].double()).norm().item() / size for y in (again, replayed))
    name = max(worst, key=lambda n: worst[n][1])
    print(
        f"{words.split('--no-cuda-graphs ')[1]}: eager twice {worst[name][0]:.1e}, graphed {worst[name][1]:.1e}: {name}"
    )
    # Attention's backward adds in any order, so two eager runs differ too.
    assert worst[name][1] <= 4 * max(w[0] for w in worst.values()) + 1e-6, (name, worst[name])


def _on_gpus(world: World, words: str) -> None:
    words = (
        f"--hidden 512 --heads 8 --kv-heads 4 --ffn 1024 --layers 3 --vocab 1000 --seq-len 256 --micro-batch 4 {words}"
    )
    words = f"--global-batch 16 --device cuda --nproc 2 --tp 2 --no-cuda-graphs {words}"
    require_same(*(trained(words, r, Layout.of(tp=2), world, 5) for r in (None, None, cuda_graphs)), words)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize(
    "words",
    [
        "--dtype bf16 --no-compile",
        "--dtype bf16 --no-compile --no-tp-comm-overlap",
        "--dtype fp32 --no-compile --dropout 0.2 --recompute block --no-sequence-parallel",
        "--dtype bf16 --compile --recompute selective --fp8 tensorwise",
    ],
)
def test_graphs_of_two_gpus_are_the_eager_step(gpus: Pool, words: str) -> None:
    """Catches: messages of a replay that those of an eager microbatch are taken for; groups that wait for graphs."""
    gpus.run(2, _on_gpus, words)
