"""Faults that change the model in some layouts, or in all: what the checks of `verify_checks` must notice.

Each is one textual replacement in one file of the package. `old` must stand there exactly once, so the table cannot
fall behind the source without being noticed.
"""

from __future__ import annotations

from verify_fault import Fault

TENSOR_PARALLEL = [
    Fault(
        "gradients of norms are not summed under sequence parallelism",
        "tensor_parallel/layers.py",
        'sum_grad=("tp",) if sequence_parallel else ()',
        "sum_grad=()",
    ),
    Fault(
        "gradients of norms are multiplied by tp",
        "tensor_parallel/layers.py",
        'sum_grad=("tp",) if sequence_parallel else ()',
        'sum_grad=("tp",)',
    ),
    Fault(
        "the row-parallel bias is added before the sum",
        "tensor_parallel/layers.py",
        """            y = linear(x, self.weight, None, self.build, column=False)
        if self.bias is None:
""",
        """            y = linear(x, self.weight, self.bias, self.build, column=False)
        if True:
""",
    ),
    Fault(
        "what enters a parallel region does not sum its gradient",
        "tensor_parallel/mappings.py",
        "return reduce_from(dy, ctx.tp, ctx.overlap_with), None, None",
        "return dy, None, None",
    ),
    Fault(
        "what leaves a parallel region sums its gradient again",
        "tensor_parallel/mappings.py",
        "return copy_to(dy, ctx.tp, ctx.overlap_with), None, None",
        "return all_reduce(dy, ctx.tp), None, None",
    ),
    Fault(
        "the gather of the sequence is adjoint to a slice, without sum",
        "collectives.py",
        "return reduce_scatter(dy, ctx.axis, ctx.dim, ctx.overlap_with), None, None, None",
        "return dy.chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank], None, None, None",
    ),
    Fault(
        "the scatter of the sequence averages in its backward",
        "collectives.py",
        "return all_gather(dy, ctx.axis, ctx.dim, ctx.overlap_with), None, None, None",
        "return all_gather(dy, ctx.axis, ctx.dim) / ctx.axis.size, None, None, None",
    ),
    Fault(
        "copies of a key/value head keep their own part of its gradient",
        "tensor_parallel/layers.py",
        'sum_grad=("tp",) if part.copies > 1 else ()',
        "sum_grad=()",
    ),
    Fault(
        "copies of a key/value head lie on the wrong ranks",
        "params/spec.py",
        "place, found, start, at = axis.rank // cut.copies, ",
        "place, found, start, at = axis.rank % parts, ",
    ),
    Fault(
        "the gradient of the heads' norm is not summed",
        "models/norm.py",
        'init, sum_grad=("tp",)',
        "ONES",
    ),
    Fault(
        "no partial gradients are summed over tensor-parallel ranks",
        "distributed/partial.py",
        "if axis.size == 1:",
        'if axis.size == 1 or name == "tp":',
    ),
]

VOCABULARY = [
    Fault(
        "a rank misses the first row of its part of the vocabulary",
        "tensor_parallel/loss_formulas.py",
        "mine = (ids >= start)",
        "mine = (ids > start)",
    ),
    Fault(
        "the vocabulary's offset is wrong by one",
        "tensor_parallel/loss_formulas.py",
        "return (ids - start) * mine, mine",
        "return (ids - start).sub(1).clamp(min=0) * mine, mine",
    ),
    Fault(
        "padding of the vocabulary takes part in the softmax",
        "tensor_parallel/cross_entropy.py",
        "[min(max(0, self.rows - n * words), words) for n",
        "[words for n",
    ),
    Fault(
        "each rank shifts its logits by its own maximum",
        "tensor_parallel/cross_entropy.py",
        "highest = all_reduce_max(reduce(torch.maximum, (top for top, *_ in found)), tp)",
        "highest = reduce(torch.maximum, (top for top, *_ in found))",
    ),
    Fault(
        "ranks that do not hold the label subtract it too",
        "tensor_parallel/loss_formulas.py",
        "one = (words == local.unsqueeze(-1)) & mine.unsqueeze(-1)",
        "one = words == local.unsqueeze(-1)",
    ),
    Fault(
        "the ends of a pipeline do not sum the gradients of a tied embedding",
        "distributed/partial.py",
        "if axis.size == 1:",
        'if axis.size == 1 or name == "embed":',
    ),
    Fault(
        "tied embeddings are summed after the norm",
        "distributed/data_parallel.py",
        "        sum_partial_gradients(self.gradients, self.state)\n",
        """        from stretto.train import step

        late = [each for each in self.gradients if "embed" in each.of.spec.sum_grad]
        sum_partial_gradients([each for each in self.gradients if each not in late], self.state)
        norm = step.grad_norm

        def norm_then_sum(weights: DataParallel) -> Tensor:
            step.grad_norm, found = norm, norm(weights)
            sum_partial_gradients(late, self.state)
            return found

        step.grad_norm = norm_then_sum
""",
    ),
    Fault(
        "a tied embedding is declared as if it were not",
        "tensor_parallel/vocab.py",
        'sum_grad=("embed",) if tied else ()',
        "sum_grad=()",
    ),
    Fault(
        "the embedding's gradient overwrites the head's where they are one",
        "tensor_parallel/vocab.py",
        "            if first_microbatch:\n                total.zero_()\n",
        "            total.zero_()\n",
    ),
    Fault(
        "the embedding's gradient counts the words of other ranks",
        "tensor_parallel/formulas.py",
        "masked = (dy * mine.unsqueeze(-1)).to(total.dtype)",
        "masked = dy.to(total.dtype)",
    ),
    Fault(
        "the head's gradient overwrites that of the microbatch before",
        "tensor_parallel/cross_entropy.py",
        "of.gemms.add(dw, first_microbatch and part.start == 0, grads, rows)",
        "of.gemms.add(dw, part.start == 0, grads, rows)",
    ),
    Fault(
        "the head's gradient is added to that of the step before",
        "tensor_parallel/cross_entropy.py",
        "of.gemms.add(dw, first_microbatch and part.start == 0, grads, rows)",
        "of.gemms.add(dw, False, grads, rows)",
    ),
]

PRODUCTS = [
    Fault(
        "a product's gradient overwrites that of the microbatch before",
        "tensor_parallel/linear.py",
        "torch.mm(left, x, out=total) if first_microbatch else total.addmm_(left, x)",
        "torch.mm(left, x, out=total)",
    ),
    Fault(
        "a product's gradient is added to that of the step before",
        "tensor_parallel/linear.py",
        "torch.mm(left, x, out=total) if first_microbatch else total.addmm_(left, x)",
        "total.addmm_(left, x)",
    ),
    Fault(
        "the gradient of what enters a product is not summed",
        "tensor_parallel/linear.py",
        "return _left(dx, build) if column else dx,",
        "return _left(dx, build) if column and build.sequence_parallel else dx,",
    ),
    Fault(
        "the gradient of what left a product comes from this rank's part of the sequence alone",
        "tensor_parallel/linear.py",
        "dy = dy if column else _entered(dy, build)",
        "dy = dy if column else torch.cat([dy] * (build.tp.size if build.sequence_parallel else 1))",
    ),
    Fault(
        "what is made again comes from this rank's part of the sequence alone",
        "tensor_parallel/linear.py",
        "recomputed = all_gather_async(x, build.tp) if gathers else AsyncTensor(x)",
        "recomputed = AsyncTensor(torch.cat([x] * (build.tp.size if gathers else 1)))",
    ),
    Fault(
        "a bias gets the mean over the tokens",
        "tensor_parallel/linear.py",
        ".sum(0)",
        ".mean(0)",
    ),
]

DROPOUT = [
    Fault(
        "every tensor-parallel rank drops what the first does under sequence parallelism",
        "tensor_parallel/dropout.py",
        "self.tp.rank if self.sequence_parallel else 0",
        "0",
    ),
    Fault(
        "tensor-parallel ranks that hold the same activation drop different elements",
        "tensor_parallel/dropout.py",
        "self.tp.rank if self.sequence_parallel else 0",
        "self.tp.rank",
    ),
]

POSITIONS = [
    Fault(
        "learned positions begin anew on each rank under sequence parallelism",
        "models/positions.py",
        "structure.first + self.rank * x.shape[0]",
        "structure.first",
    ),
    Fault(
        "rotary positions begin anew with each rank's part of the sequence",
        "models/transformer.py",
        "        return self._rotations[key]\n",
        """        own, parts = like.shape[0], seq_len // like.shape[0]
        cos, sin = self._rotations[key]
        return cos[:own].repeat(parts, 1, 1, 1), sin[:own].repeat(parts, 1, 1, 1)
""",
    ),
]

LOSS = [
    Fault(
        "the loss is divided by the tokens of the microbatch",
        "models/transformer.py",
        "batch.loss_mask.double() / microbatch.count)",
        "batch.loss_mask.double() / batch.loss_mask.sum().clamp(min=1))",
    ),
    Fault(
        "the loss is divided by the tokens of this rank",
        "train/text.py",
        'return all_reduce(own, state.axis("dp", "cp"))',
        "return own",
    ),
    Fault(
        "the loss is scaled by the number of microbatches",
        "train/text.py",
        "[batch.loss_mask.sum() for batch in batches]).sum().double()",
        "[batch.loss_mask.sum() for batch in batches]).double().mean()",
    ),
    Fault(
        "masked tokens count",
        "models/transformer.py",
        "batch.loss_mask.double()",
        "(batch.loss_mask | True).double()",
    ),
    Fault(
        "a batch without valid tokens divides by zero",
        "train/text.py",
        "clamp(min=1)",
        "clamp(min=0)",
    ),
    Fault(
        "an evaluation is the mean of its batches' means",
        "train/text.py",
        "yield microbatches, count\n",
        "yield microbatches, torch.ones_like(count)\n",
    ),
    Fault(
        "every tensor-parallel rank adds its loss",
        "train/step.py",
        'told * (state.axis("tp").rank == 0)',
        "told.clone()",
    ),
    Fault(
        "the loss stays on the last stage",
        "train/step.py",
        'return packed, all_reduce_(packed, state.axis("tp", "cp", "dp", "pp"))',
        'return packed, all_reduce_(packed, state.axis("dp", "cp"))',
    ),
]

PIPELINE = [
    Fault(
        "a gradient meets another microbatch's graph",
        "pipeline_parallel/stage.py",
        "kept = self._kept.pop(mb)",
        "kept = self._kept.pop(max(self._kept))",
    ),
    Fault(
        "the last microbatch is the one before once more",
        "pipeline_parallel/executor.py",
        "forward(a.mb, x, self._microbatches[a.mb])",
        "forward(a.mb, x, self._microbatches[min(a.mb, len(self._microbatches) - 2)])",
    ),
    Fault(
        "the gradient of the last microbatch is dropped",
        "distributed/bucket.py",
        "        write(self.view(self.grads, param) if total is None else total, param in self._fresh)\n",
        "        if self._waiting is None:\n            write(self.view(self.grads, param), param in self._fresh)\n",
    ),
    Fault(
        "each stage counts its layers from 0",
        "models/transformer.py",
        "{str(b.layer): Block(config, twice, b, ops[b.layer]) for b in part.blocks}",
        "{str(n): Block(config, twice, b, ops[b.layer]) for n, b in enumerate(part.blocks)}",
    ),
    Fault(
        "data-parallel ranks read the same rows",
        "data/feed.py",
        "range(dp_rank * micro_batch, global_batch, per_round)",
        "range(0, global_batch, per_round)",
    ),
]

DATA_PARALLEL = [
    Fault(
        "a microbatch's gradient overwrites the one before",
        "distributed/bucket.py",
        "param in self._fresh)\n        self._fresh.discard",
        "True)\n        self._fresh.discard",
    ),
    Fault(
        "gradients of the step before stay",
        "distributed/bucket.py",
        "        self._fresh, self._waiting, self.sent = set(self._spans), None, False",
        "        self._waiting, self.sent = None, False",
    ),
    Fault(
        "a bucket leaves before its last gradient",
        "distributed/data_parallel.py",
        "while self._unsent and self._unsent[0].full:",
        "while self._unsent:",
    ),
    Fault(
        "a bucket is reduced twice",
        "distributed/data_parallel.py",
        "            if bucket.due:\n",
        "            if True:\n",
    ),
    Fault(
        "gradients are averaged over data-parallel ranks",
        "distributed/bucket.py",
        "            self._work = all_reduce_(self.grads, self.axis)",
        "            self._work = all_reduce_(self.grads.div_(self.axis.size), self.axis)",
    ),
    Fault(
        "parameters without weight decay are not reduced",
        "distributed/bucket.py",
        "            self._work = all_reduce_(self.grads, self.axis)",
        "            decayed = self.items[0].weight_decay\n"
        "            self._work = all_reduce_(self.grads, self.axis) if decayed else None",
    ),
]

OPTIMIZER = [
    Fault(
        "a replicated parameter counts tp times in the norm",
        "distributed/norm.py",
        'name.partition(".")[0] not in repeated}',
        'name.partition(".")[0] not in ("tp", *repeated)}',
    ),
    Fault(
        "a tied embedding counts on both ends in the norm",
        "distributed/norm.py",
        'name.partition(".")[0] not in repeated}',
        'name.partition(".")[0] not in ("embed", *repeated)}',
    ),
    Fault(
        "the norm is that of this rank's parameters",
        "distributed/norm.py",
        "all_reduce_(self.squares, axis)",
        "all_reduce_(self.squares.clone(), axis)",
    ),
    Fault(
        "the norm adds up data-parallel ranks",
        "distributed/norm.py",
        'if everyone else ("tp", "pp")',
        "if True else ()",
    ),
    Fault(
        "gradients are clipped by the norm on this rank",
        "train/step.py",
        "clip_factor(norm, self.clip_grad)",
        "clip_factor(torch.stack([b.grads.norm() for b in self.weights.all_buckets]).norm(), self.clip_grad)",
    ),
    Fault(
        "gradients are not clipped",
        "train/step.py",
        "self.optimizer.step(lr, clip_factor(norm, self.clip_grad))",
        "self.optimizer.step(lr)",
    ),
    Fault(
        "parameters do not follow their masters",
        "distributed/rules.py",
        "    master.mul_(keep).sub_(rate * first / ((second / correction).sqrt() + eps))\n"
        "    if rounded is not None:\n",
        "    master.mul_(keep).sub_(rate * first / ((second / correction).sqrt() + eps))\n    if False:\n",
    ),
    Fault(
        "parameters follow their masters a step late",
        "distributed/rules.py",
        "    grad = grad * scale\n    first.lerp_(grad, 1 - betas[0])\n",
        "    if rounded is not None:\n        rounded.copy_(master)\n        rounded = None\n"
        "    grad = grad * scale\n    first.lerp_(grad, 1 - betas[0])\n",
    ),
    Fault(
        "the factor of clipping has no epsilon",
        "distributed/norm.py",
        "limit / (norm + 1e-6)).clamp",
        "limit / norm).clamp",
    ),
    Fault(
        "the second moment is of gradients that are not clipped",
        "distributed/rules.py",
        "    grad = grad * scale\n    first.lerp_(grad, 1 - betas[0])\n",
        "    first.lerp_(grad * scale, 1 - betas[0])\n",
    ),
    Fault(
        "the first moment is of gradients that are not clipped",
        "distributed/rules.py",
        "    grad = grad * scale\n    first.lerp_(grad, 1 - betas[0])\n",
        "    first.lerp_(grad, 1 - betas[0])\n    grad = grad * scale\n",
    ),
    Fault(
        "the second moment is not corrected",
        "distributed/rules.py",
        "((second / correction).sqrt() + eps)",
        "(second.sqrt() + eps)",
    ),
    Fault(
        "the epsilon of AdamW stands under the root",
        "distributed/rules.py",
        "((second / correction).sqrt() + eps)",
        "(second / correction + eps).sqrt()",
    ),
    Fault(
        "weights decay after the update",
        "distributed/rules.py",
        "master.mul_(keep).sub_(rate * first / ((second / correction).sqrt() + eps))",
        "master.sub_(rate * first / ((second / correction).sqrt() + eps)).mul_(keep)",
    ),
    Fault(
        "norms and biases decay",
        "distributed/optimizer.py",
        "self.rule.weight_decay if item.weight_decay else 0.0",
        "self.rule.weight_decay",
    ),
    Fault(
        "norms and biases decay where there is data parallelism",
        "distributed/optimizer.py",
        "self.rule.weight_decay if item.weight_decay else 0.0",
        "self.rule.weight_decay if item.weight_decay or self.buckets[0].axis.size > 1 else 0.0",
    ),
    Fault(
        "the learning rate grows with data parallelism",
        "distributed/optimizer.py",
        ".numbers(lr * of.lr,",
        '.numbers(lr * of.lr * self.weights.state.axis("dp").size,',
    ),
]

START = [
    Fault(
        "initial values follow the element's place on its rank",
        "params/values.py",
        "offsets=offsets, std=init.std",
        "offsets=[0] * len(offsets), std=init.std",
    ),
    Fault(
        "initial values follow the strides of the rank's block",
        "random.py",
        "stride = math.prod(full_shape[dim + 1 :])",
        "stride = math.prod(shape[dim + 1 :])",
    ),
    Fault(
        "initial values depend on the stage",
        "train/assemble.py",
        "made.initialize(seed)",
        "made.initialize(seed + axis.rank)",
    ),
    Fault(
        "initial values follow the name of the stored matrix",
        "params/values.py",
        "name=logical.name,",
        "name=item.name,",
    ),
]

FAULTS = [
    *TENSOR_PARALLEL,
    *VOCABULARY,
    *PRODUCTS,
    *DROPOUT,
    *POSITIONS,
    *LOSS,
    *PIPELINE,
    *DATA_PARALLEL,
    *OPTIMIZER,
    *START,
]
