"""As `verify_said`: flat storage, its shards, and the rules by which they are updated."""

from __future__ import annotations

from verify_fault import Fault, Said

FLAT = Said(
    "tests/layout/test_layout_flat.py",
    Fault("a tensor that begins unaligned", "layout/flat.py", "end = _up(end + size, ALIGNMENT)", "end = end + size"),
    Fault(
        "shards of unequal length",
        "layout/flat.py",
        "return range(rank * size, (rank + 1) * size)",
        "return range(rank * size, (rank + 1) * size - rank)",
    ),
    Fault(
        "a row cut in two counted whole",
        "layout/flat.py",
        "range(begin, end if first == last else row)",
        "range(begin, row)",
    ),
    Fault(
        "the last row left out",
        "layout/flat.py",
        "    if end and not (begin and first == last):\n",
        "    if False:\n",
    ),
    Fault("a gap of one element overlooked", "layout/flat.py", "if a.stop < b.start]", "if a.stop < b.start - 1]"),
    Fault("a gap of none", "layout/flat.py", "if a.stop < b.start]", "]"),
)

SHARDING = Said(
    "tests/distributed/test_distributed_sharding.py",
    Fault(
        "a shard that is another rank's",
        "distributed/bucket.py",
        "self.own = self.flat.shard(axis.rank if self.sharding.state else 0)",
        "self.own = self.flat.shard((axis.rank + 1) % axis.size if self.sharding.state else 0)",
    ),
    Fault(
        "gradients of earlier microbatches forgotten",
        "distributed/bucket.py",
        "reduce_scatter_into(self.grad, self.grads, self.axis, add=self._reduced)",
        "reduce_scatter_into(self.grad, self.grads, self.axis)",
    ),
    Fault(
        "a norm of one rank's part",
        "distributed/norm.py",
        'if everyone else ("tp", "pp")',
        'if False else ("tp", "pp")',
    ),
    Fault(
        "copies whose gradients are not summed",
        "distributed/data_parallel.py",
        "        if self._levels and self.sharding.state:\n            copies",
        "        if False:\n            copies",
    ),
    Fault(
        "weights that do not follow their shard",
        "distributed/bucket.py",
        "        elif self.sharding.state:\n",
        "        elif False:\n",
    ),
    Fault(
        "a section that stays gathered",
        "distributed/sections.py",
        "            bucket.release()\n            del self._held[bucket]\n",
        "            del self._held[bucket]\n",
    ),
    Fault(
        "gradients whose memory stays",
        "distributed/bucket.py",
        "        self._close()\n        self._reduced, self.sent",
        "        self._reduced, self.sent",
    ),
    Fault(
        "a shard that is written while others read it",
        "distributed/data_parallel.py",
        "            bucket.settle()\n",
        "",
    ),
    Fault(
        "a checkpoint that is loaded while others read",
        "distributed/progress.py",
        "            bucket.arrive()\n            bucket.settle()\n",
        "            bucket.arrive()\n",
    ),
    Fault(
        "weights that are copied on their way",
        "distributed/bucket.py",
        "        return all_gather_into(self.weights, self.shard, self._gather)",
        "        return all_gather_into(self.weights, self.shard.clone(), self._gather)",
    ),
    Fault("a model that is whole before it is sharded", "train/stages.py", "allocate=False,", "allocate=True,"),
)

SECTIONS = Said(
    "tests/distributed/test_distributed_sections.py",
    Fault(
        "a backward that does not wait for what is in no section",
        "distributed/sections.py",
        "        self._wait((*self._always, *self.uses[n]))\n        stay",
        "        self._wait(self.uses[n])\n        stay",
    ),
    Fault(
        "a gather that is begun as it is needed where a pass turns back",
        "distributed/sections.py",
        "then = 2 * n - then if turns else then",
        "then = then",
    ),
    Fault(
        "a step whose first sections wait for the whole update",
        "distributed/data_parallel.py",
        "self._asks_ahead = self.sharding.params and len(stages) == 1",
        "self._asks_ahead = False",
    ),
    Fault(
        "a third section that stays",
        "distributed/sections.py",
        "for bucket in [b for b in self._held if b not in stay]:",
        "for bucket in [b for b in self._held if b not in stay and n != 2]:",
    ),
)

GROUPING = Said(
    "tests/layout/test_layout_grouping.py",
    Fault(
        "what is quantized beside what is not",
        "layout/grouping.py",
        "(*tensor.kind, tensor.quantized, tensor.section",
        "(*tensor.kind, tensor.section",
    ),
    Fault("a head gathered for as long as all blocks", "layout/grouping.py", "LITTLE: Final = 8", "LITTLE: Final = 0"),
    Fault(
        "frozen norms with those that are trained",
        "layout/grouping.py",
        "setdefault((*tensor.kind, tensor.quantized",
        "setdefault((tensor.kind[0], tensor.quantized",
    ),
)

GATHERED_IN_FP8 = Said(
    "tests/distributed/test_distributed_quantized.py",
    Fault(
        "the largest number of a rank's own part for that of the matrix",
        "tensor_parallel/fp8_shards.py",
        "bits = all_reduce_max(largest.abs().view(torch.int32), over)",
        "bits = largest.abs().view(torch.int32)",
    ),
    Fault(
        "the largest number of all that a rank has",
        "distributed/quantized.py",
        "    parts = [part for bucket in buckets for part in bucket.parts]\n",
        "    parts = [bucket.shard for bucket in buckets for part in bucket.parts]\n",
    ),
    Fault(
        "scales that the ranks of tp do not agree on",
        "tensor_parallel/fp8_shards.py",
        "meaning(all_reduce_max(bits, self.gemms.tp).view(torch.float32)",
        "meaning(bits.view(torch.float32)",
    ),
    Fault(
        "NaN that the rank beside does not see",
        "tensor_parallel/fp8_shards.py",
        "all_reduce_max(largest.abs().view(torch.int32), over)",
        "all_reduce_max(largest.abs().nan_to_num(0.0, torch.inf).view(torch.int32), over)",
    ),
    Fault(
        "scales of the step before",
        "distributed/quantized.py",
        "        self.scales.copy_(scales)\n",
        "        self.scales.copy_(scales) if bool((self.scales == 1).all()) else None\n",
    ),
    Fault(
        "bytes of the step before",
        "distributed/quantized.py",
        "        super().updated(updating)\n        self.stale = True\n",
        "        super().updated(updating)\n",
    ),
    Fault(
        "bytes at another place",
        "distributed/quantized.py",
        "[self.part(self.own_bytes, param).flat.view(quantizer.dtype) for",
        "[self.own_bytes[: len(self.part(self.shard, param).flat)].view(quantizer.dtype) for",
    ),
    Fault("scales one behind the other", "distributed/quantized.py", "ALIGNED = 32\n", "ALIGNED = 1\n"),
    Fault("a copy across of a visit before", "distributed/quantized.py", "        self._made.clear()\n", ""),
    Fault(
        "bytes that are quantized anew while others read them",
        "distributed/quantized.py",
        "            peers.settle(self.own_bytes)\n",
        "            pass\n",
    ),
    Fault(
        "a message for each unit",
        "distributed/quantized.py",
        "(bucket,) if apart else found",
        "(bucket,)",
    ),
    Fault(
        "one message where updates come one by one",
        "distributed/data_parallel.py",
        "        agree_at_once(self.all_buckets, apart=True)\n",
        "",
    ),
    Fault(
        "norms of each block gathered by themselves",
        "layout/grouping.py",
        "if LITTLE * others[where] < numel}",
        "if numel < 0}",
    ),
    Fault(
        "copies across that the ledger leaves out",
        "estimate/sections.py",
        "across = _sum_of(self.transposed, {at}) if back else 0",
        "across = 0",
    ),
    Fault(
        "experts of one rank counted as gathered",
        "estimate/steady.py",
        "[each for each in buckets if each.storage.shards > 1]",
        "[*buckets]",
    ),
)

RULES = Said(
    "tests/distributed/test_distributed_rules.py",
    Fault(
        "a momentum that is not kept",
        "distributed/rules.py",
        "velocity.mul_(momentum).add_(",
        "velocity.mul_(0).add_(",
    ),
    Fault(
        "a decay that is not decoupled",
        "distributed/rules.py",
        "    master.mul_(keep).sub_(rate * (first * betas[0]",
        "    master.sub_(rate * (first * betas[0]",
    ),
    Fault(
        "a sign of the gradient alone",
        "distributed/rules.py",
        "(first * betas[0] + grad * (1 - betas[0])).sign()",
        "grad.sign()",
    ),
    Fault(
        "an update in bf16 where the state is",
        "distributed/rules.py",
        "wide = [state.to(master.dtype) for state in rest[:states]]",
        "wide = list(rest[:states])",
    ),
    Fault(
        "a state that is not written back",
        "distributed/rules.py",
        "            state.copy_(new)\n",
        "            pass\n",
    ),
    Fault(
        "a scale that one of the moments does not see",
        "distributed/rules.py",
        "    grad = grad * scale\n    first.lerp_(grad, 1 - betas[0])\n    second",
        "    first.lerp_(grad, 1 - betas[0])\n    grad = grad * scale\n    second",
    ),
)

PARAM_GROUPS = Said(
    "tests/distributed/test_distributed_param_groups.py",
    Fault("a multiplier that is not applied", "distributed/optimizer.py", ".numbers(lr * of.lr,", ".numbers(lr,"),
    Fault(
        "a decay of a group that is not used",
        "distributed/optimizer.py",
        "decay = decay if group.weight_decay is None else group.weight_decay",
        "decay = decay if group.lr is None else decay",
    ),
    Fault(
        "an earlier group that wins",
        "distributed/optimizer.py",
        "for group in self.groups:",
        "for group in reversed(self.groups):",
    ),
    Fault(
        "a group that holds all that is stored together",
        "distributed/optimizer.py",
        "if group.holds(part.name):",
        "if any(group.holds(each.name) for each in item.logical):",
    ),
    Fault(
        "a group without parameters that passes",
        "notation/param_groups.py",
        "if not any(map(group.holds, known))]",
        "if not known]",
    ),
)

MUON = Said(
    "tests/distributed/test_distributed_muon.py",
    Fault(
        "a matrix orthogonalized in parts",
        "distributed/muon.py",
        "x.copy_(self._one(x, dtype))",
        "x.copy_(torch.cat([self._one(half, dtype) for half in x.chunk(2)]))",
    ),
    Fault(
        "the second of two matrices that are stored together left as it is",
        "distributed/muon.py",
        "for item in bucket.items if item.matrix for part in item.logical]",
        "for item in bucket.items if item.matrix for part in item.logical[:1]]",
    ),
    Fault(
        "a momentum without the look ahead",
        "distributed/rules.py",
        "return grad.lerp(momentum, beta)",
        "return momentum.clone()",
    ),
    Fault(
        "a block that comes back to another place",
        "distributed/muon.py",
        "back = [_joined(each, like) for each in blocks]",
        "back = [_joined(each, like) for each in blocks[-1:] * size]",
    ),
    Fault(
        "a result that only its owner has",
        "distributed/muon.py",
        "all_reduce_(flat, bucket.axis).wait()",
        "pass",
    ),
    Fault(
        "an embedding orthogonalized",
        "distributed/replicate.py",
        "alone = isinstance(part, nn.Embedding | nn.EmbeddingBag)",
        "alone = False",
    ),
    Fault(
        "second moments of matrices that are kept",
        "distributed/optimizer.py",
        "[0 if b.frozen else self._matrices(b).stop for b in",
        "[0 for b in",
    ),
)

WIRE = Said(
    "tests/distributed/test_distributed_wire.py",
    Fault(
        "parts that are added in bf16",
        "distributed/wire.py",
        "total = self.x.new_zeros(self.part)",
        "total = self.sent.new_zeros(self.part)",
    ),
    Fault("an own part that is rounded", "distributed/wire.py", "if rank == self.axis.rank:", "if False:"),
    Fault(
        "replicas that are given other sums",
        "distributed/wire.py",
        "        self.x.copy_(self.sent[: self.x.numel()])\n",
        "        self.x.copy_(self.sent[: self.x.numel()])\n        own.copy_(total[: len(own)])\n",
    ),
)

LEDGER = Said(
    "tests/estimate/test_estimate_memory.py",
    Fault(
        "padding of shards left out",
        "estimate/steady.py",
        "storage = Flat(tuple(tensor.numel for tensor in tensors), shards)",
        "storage = Flat(tuple(tensor.numel for tensor in tensors), 1)",
    ),
    Fault(
        "a tied embedding counted twice",
        "estimate/stored.py",
        "if m.shared_embedding and not first:",
        "if m.shared_embedding:",
    ),
    Fault(
        "one whose both ends are on a rank counted twice",
        "estimate/memory.py",
        "own = [not (0 < s == last and 0 in mine) for s in mine]",
        "own = [True for s in mine]",
    ),
    Fault(
        "masters of wide weights counted",
        "estimate/steady.py",
        'if args.optimizer.masters == "remainder" else wide) * (item < wide)',
        'if args.optimizer.masters == "remainder" else wide)',
    ),
    Fault(
        "state of another rule",
        "estimate/steady.py",
        '{"adamw": 2, "sgd": 1, "lion": 1, "muon": 2}',
        '{"adamw": 2, "sgd": 2, "lion": 1, "muon": 2}',
    ),
    Fault(
        "moments in bf16 counted wide",
        "estimate/steady.py",
        'moment = 2 if args.optimizer.moments == "bf16" else wide',
        "moment = wide",
    ),
    Fault(
        "gradients that are sharded counted whole",
        "estimate/steady.py",
        "gradients=wide * sum(each.part if sharding.grads else each.whole for each in moved),",
        "gradients=wide * sum(each.whole for each in moved),",
    ),
    Fault(
        "gradients or masters of what is frozen counted",
        "estimate/steady.py",
        "moved = [each for each in buckets if each.trained]",
        "moved = list(buckets)",
    ),
    Fault(
        "a norm of a cut block counted on both of its stages",
        "estimate/stored.py",
        "if block.attention if after else block.feed_forward:",
        "if block.attention or block.feed_forward:",
    ),
)

HOST = Said(
    "tests/report/test_report_host_full.py",
    Fault(
        "the copy that checkpoints are written from left out",
        "estimate/host.py",
        "staging=saves * (",
        "staging=0 * (",
    ),
    Fault(
        "ranks of a node counted as one",
        "estimate/host.py",
        "_rank(args, role, memo).times(n)",
        "_rank(args, role, memo)",
    ),
    Fault(
        "copies that data-parallel ranks do not write counted",
        "estimate/host.py",
        'at["dp"] < dense and',
        "True or",
    ),
)

PLANNER = Said(
    "tests/estimate/test_estimate_planner.py",
    Fault(
        "a setting that blocks follow from left out of the key of a memo",
        "estimate/blocks.py",
        "batch = replace(args.batch, global_batch=args.batch.micro_batch)",
        "batch = replace(args.batch, global_batch=1, micro_batch=1)",
    ),
    Fault(
        "the last stage taken for one like those before",
        "estimate/memory.py",
        "s == last, ",
        "",
    ),
    Fault(
        "a search for the leanest layout that stops at the first that does not fit",
        "estimate/planner.py",
        "limit if fit else max(limit, best)",
        "limit",
    ),
)

PEAK = Said(
    "tests/estimate/test_estimate_peak.py",
    Fault(
        "the gradient of an activation left out of its layer's backward",
        "estimate/block_tape.py",
        "dactivated=s.activated)",
        "dactivated=0)",
    ),
    Fault(
        "what a region lets go of held",
        "estimate/block_tape.py",
        "if self.gemms.in_region:",
        "if False:",
    ),
    Fault(
        "a region within a checkpoint",
        "models/block_regions.py",
        "return torch._C._autograd._top_saved_tensors_default_hooks(True) is None",
        "return True",
    ),
    Fault(
        "gradients of experts' outputs left out",
        "estimate/expert_tape.py",
        "        t.make(own_dy=self._of(self.here, self.own))\n",
        "",
    ),
    Fault(
        "the head's gradient left out",
        "estimate/moments.py",
        "normed + whole + logits(args)",
        "normed + logits(args)",
    ),
    Fault(
        "tensors that are never let go of",
        "estimate/tape.py",
        "            self._live.pop(name, None)\n",
        "            pass\n",
    ),
    Fault(
        "a half of a microbatch that is left while it sends counted as it was when it began",
        "estimate/halves.py",
        "        levels[half] = stretch.left\n",
        "",
    ),
    Fault(
        "what of a ring is on its way to the next left out",
        "estimate/context_tape.py",
        "dkv_wide=3 * s.kv * s.wide",
        "dkv_wide=2 * s.kv * s.wide",
    ),
    Fault(
        "messages between stages left out",
        "estimate/workspace.py",
        "return min(ahead, each) * _sides(args) * entering_bytes(args)",
        "return 0",
    ),
    Fault(
        "gradients of rows counted once where they are put in order",
        "estimate/expert_tape.py",
        "t.make(in_order=self._of(self.here, others))",
        "pass",
    ),
    Fault(
        "rows of experts in FP8 left out",
        "estimate/expert_tape.py",
        "quantized_rows=self._of(size // self.item + self.scales, share)",
        "quantized_rows=0",
    ),
    Fault(
        "what a local name holds let go",
        "estimate/gemm_tape.py",
        "let_go = t.free if made_for_it or self.in_region else t.hold",
        "let_go = t.free",
    ),
)

QUANTIZED = Said(
    "tests/estimate/test_estimate_quantized.py",
    Fault(
        "experts left out",
        "estimate/stored.py",
        "        if not _of_gemms(name):\n",
        "        if not _of_gemms(name) or _of_experts(name):\n",
    ),
    Fault("the copy across left out", "estimate/stored.py", "found += 2 * numel + 4", "found += numel + 4"),
    Fault(
        "scales of all experts counted once",
        "estimate/stored.py",
        "stacked = m.experts // args.parallel.ep if _of_experts(name) else 1",
        "stacked = 1",
    ),
    Fault(
        "scales of other ranks' experts counted",
        "estimate/stored.py",
        "stacked = m.experts // args.parallel.ep if",
        "stacked = m.experts if",
    ),
    Fault("adapters counted", "estimate/stored.py", 'return name.endswith("_proj.weight")', 'return "_proj." in name'),
    Fault(
        "what predicts further tokens left out",
        "estimate/stored.py",
        "    for n in m.further_layers:\n",
        "    for n in ():\n",
    ),
)

LEDGER_HALVES = Said(
    "tests/estimate/test_estimate_halves.py",
    Fault(
        "a stop of one half moved",
        "estimate/halves.py",
        "(1, 2), (0, 4), (1, 3, 4))",
        "(1, 2, 3), (0, 4), (1, 4))",
    ),
    Fault(
        "the other half forgotten at a peak",
        "estimate/halves.py",
        "stretch.most.bytes + levels[1 - half]",
        "stretch.most.bytes",
    ),
    Fault(
        "outputs that are still on their way when the next block begins left out",
        "estimate/halves.py",
        "forward.now - kept if alone else ahead[-2].left - kept",
        "forward.now - kept",
    ),
)

STEP_TIME = Said(
    "tests/estimate/test_estimate_step_time.py",
    Fault(
        "weights that are gathered once a step where each microbatch gathers them",
        "estimate/step_time.py",
        "gathered = 2 * m * (item",
        "gathered = 2 * (item",
    ),
    Fault(
        "gradients that are sent twice where each rank keeps a shard",
        "estimate/step_time.py",
        "(wire if mode.state else 2 * wire)",
        "2 * wire",
    ),
    only="test_each_mode_sends_what_its_page_says",
)

CHECKPOINTS = Said(
    "tests/checkpoint/test_checkpoint_sharding.py",
    Fault(
        "a shard saved at another's place",
        "params/spec.py",
        "yield tuple(o + a - b for o, a, b in zip(offsets, low, at, strict=True)), inner",
        "yield offsets, inner",
    ),
    Fault(
        "a piece without an owner",
        "distributed/data_parallel.py",
        'cut = self._over(("dp", "cp", "edp")) if self.sharding.state else ()',
        "cut: tuple[str, ...] = ()",
    ),
    Fault(
        "parameters that do not follow what was read",
        "distributed/optimizer.py",
        "        self.steps = steps\n        self._masters.publish()\n",
        "        self.steps = steps\n",
    ),
    Fault(
        "a copy that follows the next step",
        "checkpoint/saver.py",
        "        staging.copy(tensors)\n",
        "        self.before_update = lambda: staging.copy(tensors)  # type: ignore[method-assign]\n",
    ),
)

LOOP = Said(
    "tests/distributed/test_distributed_shard.py",
    Fault(
        "a sum over the ranks in the place of a mean",
        "distributed/shard.py",
        "(torch.ones_like(norm) if factor is None else factor) / ranks",
        "torch.ones_like(norm) if factor is None else factor",
    ),
    Fault("a frozen parameter that moves", "distributed/bucket.py", "not first.requires_grad", "False"),
    Fault(
        "gradients of a step that stay for the next",
        "distributed/shard.py",
        "        self.weights.zero()\n        return norm",
        "        return norm",
    ),
    Fault(
        "a declaration that is overwritten",
        "distributed/replicate.py",
        "known = {getattr(part, name) for part in module.modules() for name in declared_in(part)}",
        "known: set[nn.Parameter] = set()",
    ),
)

NOT_FINITE = Said(
    "tests/train/test_train_not_finite.py",
    Fault("a rank that is not named", "train/not_finite.py", "if not fine]", "if False]"),
    Fault(
        "a parameter that is not named",
        "train/not_finite.py",
        "if not math.isfinite(norm)})",
        "if norm != norm})",
    ),
    Fault(
        "a microbatch counted from another step",
        "distributed/watch.py",
        "        self._times.clear()\n",
        "",
    ),
    Fault(
        "a step that only some skip",
        "train/step.py",
        "torch.isfinite(total[0]) & torch.isfinite(norm))",
        "torch.isfinite(loss))",
    ),
    Fault(
        "a step that is skipped and not counted",
        "train/loop.py",
        'told["skipped_steps"] = self._skipped or None',
        'told["skipped_steps"] = None',
    ),
)

OWN_LOOPS = Said(
    "tests/distributed/test_distributed_own_loops.py",
    Fault(
        "weights in use outside of the sections that are read before they have come",
        "distributed/sections.py",
        "        outside = outside_of(module, sections)\n",
        "        outside = outside_of(module, [[module]])\n",
    ),
    Fault(
        "a sum that is begun by the number of forwards",
        "distributed/shard.py",
        "self._backwards == self.microbatches - 1",
        "True",
    ),
    Fault(
        "a state_dict of weights that are on their way",
        "distributed/handed_over.py",
        "        bucket.arrive()\n",
        "",
    ),
    Fault(
        "a parameter that is thawed and never moves",
        "distributed/progress.py",
        "for p in frozen if p.requires_grad]",
        "for p in frozen if False]",
    ),
    Fault(
        "a gradient of the step before where there is none",
        "distributed/bucket.py",
        "        for param in self._fresh:\n",
        "        for param in ():\n",
    ),
)
