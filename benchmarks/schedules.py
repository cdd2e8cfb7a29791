"""How fast schedules are made, and whether a real step takes as long as a simulated one.

    python -m benchmarks.schedules make              # 64 ranks x 4 stages, 1,024 microbatches, beside torch's own
    python -m benchmarks.schedules run --pp 4        # steps of `stretto train` over Gloo, padded by sleeps
    python -m benchmarks.schedules real --pp 2 --device cuda --shape D4       # of a model that is large enough

`make` times what each library needs before the first step: the order, its check, and the messages and gathers between
the computations. `run` (benchmarks/schedule_steps.py) compares each schedule's step with `simulate`;
so does `real` (benchmarks/schedule_real.py), where nothing is padded and costs are measured.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import schedule_real
from benchmarks.schedule_steps import measure
from benchmarks.train.data import write_tokens
from benchmarks.train.shapes import SHAPES, Job
from stretto.launch.local import run_local
from stretto.schedule import FSDP, GENERATORS, check, lower, schedule_for


def make(p: int, v: int, m: int, beside: bool) -> int:
    """Print seconds of each pass, ours and torch's: of the processor, which others may share."""
    begin = time.process_time()
    s = schedule_for("interleaved", p, m, v)
    made = time.process_time()
    check(s)
    checked = time.process_time()
    program = lower(s, FSDP)
    end = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"interleaved, {p} ranks x {v} stages, {m} microbatches: {s.num_actions:,} computations")
    print(
        f"stretto: order {made - begin:.2f} s, check {checked - made:.2f} s, lower to {program.num_actions:,} actions "
        f"{end - checked:.2f} s; {end - begin:.2f} s, {memory:.2f} GiB of the process"
    )
    if beside:
        torch_order(p, v, m)
    return 0


def torch_order(p: int, v: int, m: int) -> None:
    """The functions behind torch's ScheduleInterleaved1F1B and its runtime, in its order of calls."""
    from torch.distributed.pipelining import schedules as theirs

    begin = time.process_time()
    order = {}
    for rank in range(p):
        warmup = min((v - 1) * p + 2 * (p - 1 - rank), m * v)

        def forward(step: int, rank: int = rank) -> int:
            return step // p % v * p + rank

        def backward(step: int, rank: int = rank, warmup: int = warmup) -> int:
            return (v - 1 - (step - warmup) // p % v) * p + rank

        rest = m * v - warmup
        order[rank] = theirs._get_1f1b_rank_ops(v, p, warmup, rest, m * v - rest, rank, forward, backward)
    made = time.process_time()
    print(f"torch {torch.__version__}: order {made - begin:.2f} s", flush=True)
    plain = {rank: [a for a in actions if a is not None] for rank, actions in order.items()}
    gathered = {rank: theirs._add_unshard_reshard(actions) for rank, actions in plain.items()}
    unsharded = time.process_time()
    print(f"torch: gathers {unsharded - made:.2f} s", flush=True)
    theirs._add_send_recv(gathered, lambda stage: stage % p, p * v)
    print(f"torch: messages {time.process_time() - unsharded:.2f} s; {time.process_time() - begin:.2f} s in all")


def real(said: argparse.Namespace) -> int:
    """Steps of a model on the ranks' devices; messages over NCCL where these are GPUs."""
    p, shape, gpu = said.pp or 2, SHAPES[said.shape], said.device == "cuda"
    names = tuple(said.schedules or sorted(GENERATORS))
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens"
        write_tokens(tokens, shape)
        job = Job(shape, "pp", p, said.device, "bf16" if gpu else "fp32", gpu, str(tokens))
        plan = schedule_real.Plan(job, names, said.warmup, said.steps, said.words)
        return run_local(p, partial(schedule_real.measure, plan, said.out, said.timelines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "real"])
    parser.add_argument("--pp", type=int)
    parser.add_argument("--vpp", type=int, default=4)
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--alone", action="store_true", help="make: without torch beside")
    parser.add_argument("--layers", type=int, default=24, help="run: of the model")
    parser.add_argument("--layer", type=float, default=0.02, help="run: seconds of a layer's forward")
    parser.add_argument("--head", type=float, default=0.0, help="run: all that the head takes, in layers")
    parser.add_argument(
        "--realtime", action="store_true", help="run: at once after each sleep, whoever uses the machine"
    )
    parser.add_argument("--schedules", nargs="*", help="run, real: these names (all)")
    parser.add_argument("--out", type=Path, help="run, real: the figures go there as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="real: of the ranks")
    parser.add_argument(
        "--shape", choices=SHAPES, default="D0", help="real: the model, by its name in benchmarks.train"
    )
    parser.add_argument("--steps", type=int, default=6, help="real: that are timed, of each schedule")
    parser.add_argument("--warmup", type=int, default=3, help="real: steps before costs are measured")
    parser.add_argument("--words", default="", help="real: further words of stretto train")
    parser.add_argument("--timelines", type=Path, help="real: a directory for what `stretto schedule draw` takes")
    said = parser.parse_args()
    if said.what == "make":
        return make(said.pp or 64, said.vpp, said.microbatches or 1024, not said.alone)
    if said.what == "real":
        return real(said)
    p, names = said.pp or 4, said.schedules or sorted(GENERATORS)
    sizes = p, said.microbatches or 8, said.layers, said.layer, said.head
    work = partial(measure, names, *sizes, said.out, said.realtime)
    return run_local(p, work)


if __name__ == "__main__":
    raise SystemExit(main())
