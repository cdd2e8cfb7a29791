"""As `verify_said`: the training loop that never waits, and what strangers may send."""

from __future__ import annotations

from verify_fault import Fault, Said

READBACK = Said(
    "tests/train/test_train_readback.py",
    Fault(
        "figures of a step that are read before the next one is launched",
        "train/loop.py",
        "pending = self._first_step() if self._first else self._step()",
        "pending = self._first_step()",
    ),
    Fault(
        "a host read anywhere else in a step",
        "train/loop.py",
        "        figures = read(",
        "        result.loss.item()\n        figures = read(",
    ),
    Fault(
        "an evaluation that reads each batch",
        "train/text.py",
        "yield microbatches, count\n",
        "yield microbatches, count.item()\n",
    ),
    Fault(
        "a number of the host that is put into one element",
        "train/step.py",
        "packed[1].fill_(votes)",
        "packed[1] = votes",
    ),
    Fault(
        "a step that counts as done when it was launched",
        "train/loop.py",
        "pending.launched, ago=pending.figures.ago",
        "pending.launched",
    ),
    Fault(
        "a step whose figures are late, and that counts as done when they are read",
        "train/meter.py",
        "self._clock() - ago",
        "self._clock()",
    ),
)

METERED = Said(
    "tests/train/test_train_metered.py",
    Fault(
        "a skipped step whose time is that of the next one",
        "train/loop.py",
        "        self.meter.stepped(pending.launched, ago=pending.figures.ago, data=pending.data)\n",
        "        if math.isfinite(loss):\n"
        "            self.meter.stepped(pending.launched, ago=pending.figures.ago, data=pending.data)\n",
    ),
    Fault(
        "the first step in a mean with others",
        "train/loop.py",
        "            if first:  # what",
        "            if not first:  # what",
    ),
    Fault(
        "replicas compared in the time of a step",
        "train/loop.py",
        "saving or checking or self._stopped",
        "saving or self._stopped or (checking and require_equal_replicas(self.assembly, self.state, 0))",
    ),
    Fault(
        "seconds of an earlier `fit` told of the next one",
        "train/trainer.py",
        "            totals.subtract(before)\n",
        "",
    ),
    Fault(
        "a step that the device was done with before the host came to wait for it, and that took less than no time",
        "train/meter.py",
        "ended if ended > self._since else",
        "ended if ended else",
    ),
    Fault(
        "rows of the step that is launched next",
        "train/loop.py",
        "data=pending.data",
        'data=self.meter.last("data")',
    ),
)

CONSENSUS = Said(
    "tests/train/test_train_consensus.py",
    Fault(
        "two learning rates, which no collective notices",
        "train/consensus.py",
        "if len(ranks) > 1:\n            wrong",
        "if len(ranks) > 2:\n            wrong",
    ),
    Fault(
        "a rank's own directory taken for a difference",
        "train/consensus.py",
        "if not s.is_path and",
        "if",
    ),
)

EARLY = Said(
    "tests/train/test_train_found_early.py",
    Fault(
        "ranks that have lists of other lengths",
        "train/batches.py",
        "hashlib.sha256(repr(batches).encode())",
        "hashlib.sha256()",
    ),
    Fault(
        "a directory that lies on each node's own disk taken for one that all share",
        "checkpoint/probe.py",
        "if not _seen(probe):",
        "if not probe:",
    ),
    Fault(
        "a directory that cannot be written to found out at the first save",
        "train/saves.py",
        "        require_shared(self.policy.directory, Peers.of(self.state.world, self._group))\n",
        "",
    ),
)

ATTACK = Said(
    "tests/initialize/test_initialize_attack.py",
    Fault(
        "a report of a failure that is unpickled",
        "initialize/failure_watch.py",
        "return heard(value) or Failure.decode(value)",
        'return __import__("pickle").loads(value)',
    ),
    Fault(
        "a watching thread that ends in silence at a value it cannot read",
        "initialize/failure_watch.py",
        "except ValueError as error:",
        "except KeyError as error:",
    ),
    Fault(
        "a store that listens on all addresses though a loopback address was asked for",
        "initialize/stores.py",
        "where in found:",
        "where in found[:0]:",
    ),
    Fault(
        "control sequences that reach the terminal",
        "initialize/failures.py",
        "(printable(said[each]) for each in",
        "(said[each] for each in",
    ),
    Fault(
        "objects between ranks by pickle",
        "exchange.py",
        "dist.all_gather(lengths, length, group=group)",
        "dist.all_gather_object(lengths, length, group=group)",
    ),
)

BUFFERS = Said(
    "tests/train/test_train_buffers.py",
    Fault(
        "buffers left out of a checkpoint",
        "train/trainer.py",
        "            buffers = Buffers.of(model.stages, state)\n",
        "            Buffers.of(model.stages, state)\n",
    ),
    Fault("what is not persistent saved", "train/buffers.py", "if name not in left_out:", "if True:"),
    Fault(
        "ranks that begin with buffers of their own",
        "train/buffers.py",
        "            found.align(state)\n",
        "",
    ),
    Fault(
        "a save that sees what a later forward has done",
        "train/buffers.py",
        "tensor.detach().clone() if copied else tensor.detach()",
        "tensor.detach()",
    ),
)

EXCHANGE = Said(
    "tests/exchange/test_exchange_values.py",
    Fault(
        "a shorter text that keeps the padding of a longer one",
        "exchange.py",
        "each[:n].cpu()",
        "each.cpu()",
    ),
    Fault(
        "a dtype that changes on the way",
        "exchange.py",
        ".cpu().contiguous()",
        ".cpu().float().contiguous()",
    ),
    Fault(
        "ranks out of order",
        "exchange.py",
        "in zip(gathered, sizes, strict=True)",
        "in zip(gathered[::-1], sizes[::-1], strict=True)",
    ),
)
