"""As `verify_said`: schedules on the real model."""

from __future__ import annotations

from verify_fault import Fault, Said

SCHEDULES = Said(
    "tests/train/test_train_schedules.py",
    Fault(
        "a weight gradient that is computed in the I",
        "distributed/main_gradients.py",
        "return self.deferred.collecting and self.deferred.defer(weight, partial(self._add, weight, write))",
        "return False",
    ),
    Fault(
        "a tied embedding that is two parameters on one rank",
        "train/stages.py",
        "embedding=None if first is None else first.weight",
        "embedding=None",
    ),
    Fault(
        "a head that counts only with the W",
        "tensor_parallel/cross_entropy.py",
        "into.complete(ctx.param)",
        "into.add(ctx.param, lambda *_: None)",
    ),
    Fault(
        "an evaluation that takes the stages for single ones",
        "train/assemble.py",
        "forward_only(axis.size, schedule.num_microbatches, layout.placement)",
        "forward_only(axis.size, schedule.num_microbatches)",
    ),
)

CUT_BLOCKS = Said(
    "tests/models/test_models_cut.py",
    Fault(
        "a cut block that leaves out its residual",
        "models/block.py",
        "mid: Tensor = past + added",
        "mid: Tensor = added",
    ),
    Fault(
        "a norm of the other sublayer",
        "models/block.py",
        "normed(first if after else second, not sparse or after)",
        "normed(first, not sparse or after)",
    ),
    Fault(
        "a feed-forward that has the number of the next layer",
        "schedule/blocks.py",
        "return StageBlock(layer, Sublayers.FEED_FORWARD)",
        "return StageBlock(layer + 1, Sublayers.FEED_FORWARD)",
    ),
    Fault(
        "dropout that is drawn anew",
        "models/block.py",
        'Dropout(config.dropout, f"{name}.mlp", build)',
        'Dropout(config.dropout, f"{name}.mlp.{block.sublayers.value}", build)',
    ),
    Fault(
        "a parallel residual that is cut",
        "models/block.py",
        "if config.parallel_residual and not block.whole:",
        "if config.parallel_residual and not block:",
    ),
)

COSTS = Said(
    "tests/benchmarks/test_benchmarks_schedule_real.py",
    Fault(
        "a cost that holds the wait for a message",
        "pipeline_parallel/executor.py",
        """        dy = self._take_gradient(a)
        with self.clock.measured(a):
            dx = self.stages[a.stage].backward(a.mb, dy)
""",
        """        with self.clock.measured(a):
            dy = self._take_gradient(a)
            dx = self.stages[a.stage].backward(a.mb, dy)
""",
    ),
    Fault(
        "a program that runs on under the name of the next one",
        "pipeline_parallel/executor.py",
        "made = Executor(program, self.rank, self.stages, self.link, self.weights)",
        "made = Executor(self.program, self.rank, self.stages, self.link, self.weights)",
    ),
)
