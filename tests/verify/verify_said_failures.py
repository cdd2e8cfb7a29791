"""As `verify_said`: what ranks say over the store, whom a failure names, and what goes wrong while a run goes on."""

from __future__ import annotations

from verify_fault import Fault, Said

FAILURES = Said(
    "tests/initialize/test_initialize_failures.py",
    Fault(
        "any text with the word timeout, or an error of a file, that is taken for a lost peer",
        "initialize/failures.py",
        "return said and bool(_PEER_IS_GONE.search(words))",
        "return bool(_PEER_IS_GONE.search(words))",
    ),
    Fault(
        "a rank that lost another one as torchrun's root cause",
        "initialize/torchrun.py",
        "int(time.time()) + follows",
        "int(time.time())",
    ),
)

STORE = Said(
    "tests/store/test_store_requests.py",
    Fault(
        "a request without a deadline",
        "store.py",
        "value, error = answer.get(timeout=seconds)",
        "value, error = answer.get()",
    ),
    Fault(
        "a rank left out of a merge or counted twice",
        "store.py",
        'merge(store.multi_get([f"{level}/{i}" for i in members]))',
        'merge(store.multi_get([f"{level}/{i}" for i in members[1:]]))',
    ),
    Fault(
        "an absent rank whose whole block is named, or that is not named when it is the only one of its block",
        "store.py",
        'for place in missing if not store.check([f"{level}/{place}"])]',
        'for place in missing if level == 0 or not store.check([f"{level}/{place}"])]',
    ),
    Fault(
        "a value of a stranger that is parsed",
        "store.py",
        "if len(value) > LARGEST:",
        "if len(value) > 2 * LARGEST:",
    ),
)

COUNTS = Said(
    "tests/benchmarks/test_benchmarks_store_counts.py",
    Fault(
        "a rank that reads what every other one wrote",
        "parallel_state/same_plan.py",
        '    store.set(f"digest/{world.rank}", digest)\n',
        '    store.set(f"digest/{world.rank}", digest)\n    store.check([f"digest/{r}" for r in range(world.size)])\n',
    ),
    Fault(
        "rank 0 that collects",
        "initialize/rendezvous.py",
        '    if launch.rank == 0 and not store.poll("verdict"',
        "    if launch.rank == 0:\n"
        '        store.check([f"hello/{r}" for r in range(launch.size)])\n'
        '    if launch.rank == 0 and not store.poll("verdict"',
    ),
    Fault(
        "a record with lists of ranks",
        "collective_trace/last.py",
        "c.ranks if len(c.ranks) <= 2 else []",
        "c.ranks",
    ),
)

PACE = Said(
    "tests/train/test_train_slow_ranks.py",
    Fault(
        "time spent in waiting for others that counts as work",
        "train/slow_ranks.py",
        "self._busy.append(whole - (self.waited() - waited))",
        "self._busy.append(whole)",
    ),
    Fault(
        "a rank compared with stages that do other work",
        "train/slow_ranks.py",
        "equals = ranks[stage] > 1",
        "equals = False",
    ),
    Fault(
        "a rank named again and again",
        "train/slow_ranks.py",
        "self._found[each.rank] == WINDOWS",
        "self._found[each.rank] >= WINDOWS",
    ),
)

SOUND = Said(
    "tests/train/test_train_sound.py",
    Fault(
        "replicas along an axis that are not compared",
        "train/sound.py",
        'names = [("dp", "cp"), ("tp",), ',
        'names = [("dp", "cp"), ',
    ),
    Fault(
        "a flipped bit that the checksum does not see",
        "params/checksum.py",
        "bits = x.contiguous().view(_BITS[x.element_size()])",
        "bits = x.long()",
    ),
    Fault(
        "a rank of the majority that is accused",
        "train/sound.py",
        "odd = [rank for rank, value in version.items() if value != common]",
        "odd = [rank for rank, value in version.items() if value == common]",
    ),
    Fault(
        "a NaN in what no token used that is saved",
        "train/loop.py",
        "        require_finite(self.assembly, self.state, step)\n",
        "",
    ),
    Fault(
        "sharded weights that are looked at where they are not",
        "train/sound.py",
        "sharded = weights.sharding.params",
        "sharded = False",
    ),
    Fault(
        "gathered weights that are not compared",
        "train/sound.py",
        "if d.param.element_size() >= 4 and weights",
        "if False and weights",
    ),
)

OWN_PROGRAM = Said(
    "tests/collective_trace/test_collective_trace_own_program.py",
    Fault(
        "a program of one's own that is not told who did not come",
        "parallel_state/state.py",
        "if tracer is None and world.lost is not None:",
        "if False:",
    ),
)
