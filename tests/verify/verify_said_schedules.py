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

PROVEN_LATE = Said(
    "tests/train/test_train_post_validate.py",
    Fault(
        "a step in vain that adds to the gradients of the one before",
        "distributed/bucket.py",
        "if self.frozen or self.ignoring:",
        "if self.frozen:",
    ),
    Fault(
        "moments that do not follow the weights",
        "train/post_validate.py",
        'self.flat.step(made.lr, made.factor, write="rest")',
        "self.flat.steps += 1",
    ),
    Fault(
        "weights of which the update is made twice",
        "distributed/rules.py",
        "adamw(master.clone(), rounded, grad, first.clone(), second.clone(), *rest)",
        "adamw(master, rounded, grad, first, second, *rest)",
    ),
    Fault(
        "an update that is proven when its gradients are gone",
        "pipeline_parallel/executor.py",
        "if coming and (action.op in _ADDING or (action.op is Op.F and action.stage == self._last)):",
        "if coming and action.op is Op.REDUCE:",
    ),
)

MESSAGES = Said(
    "tests/peer_buffer/test_peer_messages_order.py",
    Fault(
        "a slot that is filled before it has been read",
        "peer_messages.py",
        "if self._sent > SLOTS:",
        "if False:",
    ),
    Fault(
        "a message that is fetched before it is there",
        "peer_messages.py",
        "        self._fetch.wait(self._flag(self._rank, _READY, slot), self._received)\n",
        "",
    ),
    Fault(
        "the slot of the message before",
        "peer_messages.py",
        "self._fetch.copy(out.data_ptr(), self._slot(1 - self._rank, slot), out.nbytes)",
        "self._fetch.copy(out.data_ptr(), self._slot(1 - self._rank, 1 - slot), out.nbytes)",
    ),
)
