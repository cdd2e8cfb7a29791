"""Is one UNSHARD, RESHARD and REDUCE for each stage and step enough, and where would more of them go?

    python benchmarks/spike_weights.py

Counts, for programs under full sharding, the gathers of a step and the most stages that are whole at a time on one
rank: with `lower`'s one position each, and with a policy that lets go of weights not needed for a while. Then shows
that a weight may lose its storage between forward and backward, though the graph has saved it.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import get_gradient_edge

from stretto.schedule import FSDP, Action, Op, Schedule, gpipe, lower, one_f_one_b

USES = (Op.F, Op.B, Op.I, Op.W)


def counts(program: Schedule) -> tuple[int, int]:
    """(gathers on one rank, most stages whole on one rank); the worst rank each."""
    gathers = peak = 0
    for order in program.ranks:
        whole: set[int] = set()
        for a in order:
            if a.op is Op.UNSHARD:
                whole.add(a.stage)
            elif a.op is Op.RESHARD:
                whole.discard(a.stage)
            elif a.op in USES:
                assert a.stage in whole, f"{a} without its weights"
            peak = max(peak, len(whole))
        gathers = max(gathers, sum(a.op is Op.UNSHARD for a in order))
    return gathers, peak


def let_go(program: Schedule, keep: int, ahead: int) -> Schedule:
    """RESHARD a stage whose next use is more than `keep` uses away; UNSHARD it `ahead` uses before that."""

    def rank(order: tuple[Action, ...]) -> tuple[Action, ...]:
        plain = [a for a in order if a.op not in (Op.UNSHARD, Op.RESHARD)]
        uses = [n for n, a in enumerate(plain) if a.op in USES]
        before: dict[int, list[Action]] = {n: [] for n in range(len(plain))}
        after: dict[int, list[Action]] = {n: [] for n in range(len(plain))}
        for stage in dict.fromkeys(a.stage for a in plain):
            mine = [k for k, n in enumerate(uses) if plain[n].stage == stage]
            for previous, k, following in zip([None, *mine], mine, [*mine[1:], None], strict=False):
                if previous is None or k - previous > keep:
                    earliest = 0 if previous is None else previous + 1
                    before[uses[max(k - ahead, earliest)]].append(Action(stage, Op.UNSHARD))
                if following is None or following - k > keep:
                    after[uses[k]].append(Action(stage, Op.RESHARD))
        return tuple(a for n, it in enumerate(plain) for a in (*before[n], it, *after[n]))

    return Schedule(program.placement, program.num_microbatches, tuple(map(rank, program.ranks)))


def layers_on_one_rank(stages: int, m: int) -> Schedule:
    """No pipeline: each group of layers is a stage of the one rank, microbatch after microbatch."""
    order: list[Action] = []
    for mb in range(m):
        order += [Action(s, Op.F, mb) for s in range(stages)]
        order += [Action(s, Op.B, mb) for s in reversed(range(stages))]
    return Schedule((0,) * stages, m, (tuple(order),))


def freed_between_forward_and_backward() -> bool:
    """A gathered weight gives its storage back after F and is gathered anew, into the same storage, before B."""
    torch.manual_seed(0)
    w, x = torch.randn(64, 64), torch.randn(8, 64, requires_grad=True)
    gathered = torch.empty(64, 64, requires_grad=True)
    storage, size = gathered.untyped_storage(), gathered.untyped_storage().nbytes()
    with torch.no_grad():
        gathered.copy_(w)
    edge = get_gradient_edge((x @ gathered.T).tanh().sum())
    storage.resize_(0)  # RESHARD
    storage.resize_(size)  # UNSHARD
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(gathered):
        gathered.copy_(w)
    torch.autograd.backward(edge)
    x2, w2 = x.detach().requires_grad_(), w.clone().requires_grad_()
    (x2 @ w2.T).tanh().sum().backward()
    return all(torch.equal(a.grad, b.grad) for a, b in ((x, x2), (gathered, w2)) if a.grad is not None)


def main() -> None:
    print(f"{'FSDP':44}{'gathers':>8}{'most stages whole':>20}")
    for name, schedule in {
        "1F1B, 4 ranks, 8 microbatches": one_f_one_b(4, 8),
        "GPipe, 4 ranks, 8 microbatches": gpipe(4, 8),
        "no pipeline, 8 groups of layers, 1 microbatch": layers_on_one_rank(8, 1),
        "no pipeline, 8 groups of layers, 4 microbatches": layers_on_one_rank(8, 4),
    }.items():
        program = lower(schedule, FSDP)
        print(f"{name:50}{counts(program)[0]:>6}{counts(program)[1]:>12}    one position each")
        for keep in (1, 2, 4):
            more = let_go(program, keep, ahead=1)
            print(f"{'':50}{counts(more)[0]:>6}{counts(more)[1]:>12}    let go if idle for more than {keep} uses")
    print("\none of the programs:", *let_go(lower(layers_on_one_rank(3, 1), FSDP), 1, 1).ranks[0])
    print("weights may lose their storage between F and B:", freed_between_forward_and_backward())


if __name__ == "__main__":
    main()
