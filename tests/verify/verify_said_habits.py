"""As `verify_said`: loops around a module of one's own."""

from __future__ import annotations

from verify_fault import Fault, Said

HABITS = Said(
    "tests/distributed/test_distributed_habits.py",
    Fault(
        "ranks that each begin from weights of their own",
        "distributed/alike.py",
        "        take_first(item.param.data, state.axis(*item.replicas))\n",
        "        pass\n",
    ),
    Fault(
        "buffers of each rank",
        "distributed/alike.py",
        '        take_first(buffer, state.axis("dp", "cp"))\n',
        "        pass\n",
    ),
    Fault(
        "a norm that counts what every stage holds once for each",
        "distributed/alike.py",
        "return () if all(",
        'return ("pp",) if all(',
    ),
    Fault(
        "copies of other weights that count as one",
        "distributed/alike.py",
        "read_together([checksum(x) for x in undeclared.values()])",
        "[0 for _ in undeclared]",
    ),
    Fault(
        "`clip_grad_norm_` that clips nothing",
        "distributed/shard.py",
        "        param.grad = self._stand_ins[param]\n",
        "",
    ),
    Fault(
        "weights written to while they were whole",
        "distributed/progress.py",
        "written = [name for bucket in self.all_buckets for name in unlike_shard(bucket)]",
        "written = []",
    ),
    Fault(
        "masters that do not follow `param.data`",
        "distributed/shard.py",
        "            self.inner.require_own_weights()\n",
        "",
    ),
    Fault(
        "gradients that `zero_grad` leaves",
        "distributed/shard.py",
        "        self.weights.forget()\n",
        "",
    ),
    Fault(
        "a sparse gradient",
        "distributed/data_parallel.py",
        "grad.to_dense() if grad.is_sparse else grad",
        "grad",
    ),
)
