"""As `verify_said`: what makes a step fast or small."""

from __future__ import annotations

from verify_fault import Fault, Said

FAST = Said(
    "tests/train/test_train_fast.py",
    Fault(
        "an activation that is made again in less precision",
        "tensor_parallel/linear.py",
        "x = lazy.made_by.forward(*(x.detach() for x in inputs))",
        "x = lazy.made_by.forward(*(x.detach().float() for x in inputs)).to(weight.dtype)",
    ),
    Fault(
        "a fused update that is written into a copy",
        "distributed/optimizer.py",
        "_update if fuse is None else fuse(_update)",
        "_update if fuse is None else fuse(lambda master, *rest: _update(master.clone(), *rest))",
    ),
    Fault(
        "an update that is compiled anew in later steps",
        "distributed/optimizer.py",
        "self._update(master, narrow, bucket.grads, first, second,",
        """update = self._update

            def compiled_in(*given: Any) -> None:
                plain = [x.item() if isinstance(x, Tensor) and x.dim() == 0 else x for x in given]
                torch.compile(_update)(*plain)

            update = update if update is _update else compiled_in
            update(master, narrow, bucket.grads, first, second,""",
    ),
    Fault(
        "a bucket that does not hear of what has arrived",
        "distributed/bucket.py",
        "self._waiting.discard(param)",
        "pass",
    ),
    Fault(
        "a bucket that leaves with the first of two gradients of a tied embedding",
        "distributed/direct.py",
        "if self._added[weight] == self._uses[weight]:",
        "if self._added[weight] > 0:",
    ),
    Fault(
        "a use of a weight that is not announced",
        "tensor_parallel/vocab.py",
        "        self.measure = HeadLoss(build, self.start, self.rows)\n        expect(self.weight, build)\n",
        "        self.measure = HeadLoss(build, self.start, self.rows)\n",
    ),
    Fault(
        "gradients of a weight that are counted on from one backward to the next",
        "distributed/direct.py",
        "            self._added[weight] = 0\n",
        "",
    ),
)
