"""What the docstrings of tests say that they catch: the same words, each with the fault put into the package.

A docstring lists them after `Faults to catch:`, with semicolons between them; a test holds the two together.
"""

from __future__ import annotations

from verify_fault import Fault, Said
from verify_said_arguments import CLAUSES
from verify_said_bash import BASH, SCRIPTS
from verify_said_context import (
    AUTOGRAD,
    BLOCK_REGIONS,
    CONTEXT_ATTENTION,
    CONTEXT_LAYOUTS,
    CONTEXT_NEEDED,
    CUT,
    DEAL,
    LAUNCHES,
    OFFLOAD,
    PACKED,
    REGION,
    TILE,
    UNGUARDED,
    WINDOWED,
)
from verify_said_data import INDEXED, LOST, MIXTURE, PARTS, RUNS, STREAMS, TEXT_FILES
from verify_said_experts import (
    ASKED,
    BESIDE,
    CROSSING,
    EXACT,
    FP8_EXPERTS,
    HALVES,
    KEPT,
    KERNELS_EXPERTS,
    LAYOUTS,
    PEERS,
    PEERS_LAYOUTS,
    PEERS_MEMORY,
    ROUTER,
    SENT,
)
from verify_said_failures import COUNTS, FAILURES, OWN_PROGRAM, PACE, SOUND, STORE
from verify_said_fast import FAST, HEAD, KERNELS, KERNELS_FP8, KERNELS_HEAD_NORM, MODEL, POINTWISE
from verify_said_habits import HABITS
from verify_said_hf import CACHE, CONFIG, FAMILIES, FILES, IN_AND_OUT
from verify_said_kernels import KERNELS_ADAMW, KERNELS_EMBEDDING, KERNELS_LOSS
from verify_said_loop import ATTACK, BUFFERS, CONSENSUS, EARLY, EXCHANGE, METERED, READBACK
from verify_said_residence import RESIDENCE
from verify_said_schedules import COSTS, CUT_BLOCKS, MESSAGES, PROVEN_LATE, SCHEDULES
from verify_said_settings import ELSEWHERE
from verify_said_sharding import (
    CHECKPOINTS,
    FLAT,
    GATHERED_IN_FP8,
    GROUPING,
    HOST,
    LEDGER,
    LEDGER_HALVES,
    LOOP,
    MUON,
    NOT_FINITE,
    OWN_LOOPS,
    PARAM_GROUPS,
    PEAK,
    PLANNER,
    QUANTIZED,
    RULES,
    SECTIONS,
    SHARDING,
    STEP_TIME,
    WIRE,
)
from verify_said_tensor import FOREIGN, PLANS, RECOMPUTE, SHAPES
from verify_said_tuning import ADAPTER_IN, ADAPTERS, CHAT, SHARE, TOKENIZERS, TUNING

COLLECTIVES = Said(
    "tests/collectives/test_collectives_wrappers.py",
    Fault(
        "a sum left out of a forward",
        "collectives.py",
        "        work = all_reduce_(out, axis)\n        overlap_with()\n        work.wait()\n",
        '        axis.tell("all_reduce", out)\n        overlap_with()\n',
    ),
    Fault(
        "a sum left out of a backward",
        "collectives.py",
        "return all_reduce(dy, ctx.axis, ctx.overlap_with), None, None",
        "return dy, None, None",
    ),
    Fault(
        "a gather along the wrong dimension",
        "collectives.py",
        "return whole.wait().movedim(0, dim)",
        "return whole.wait()",
    ),
    Fault(
        "all_to_all turned the wrong way round in its backward",
        "collectives.py",
        "all_to_all(dy, ctx.axis, concat_dim, split_dim)",
        "all_to_all(dy, ctx.axis, split_dim, concat_dim)",
    ),
    Fault(
        "a sum that changes its input",
        "collectives.py",
        "out = x.clone(memory_format=torch.contiguous_format)\n        work = all_reduce_(out, axis)",
        "out = x.detach().contiguous()\n        work = all_reduce_(out, axis)",
    ),
    Fault(
        "a backward of detached tensors",
        "collectives.py",
        "return all_gather(dy, ctx.axis, ctx.dim, ctx.overlap_with), None, None, None",
        "return all_gather(dy.detach(), ctx.axis, ctx.dim), None, None, None",
    ),
)

PARAMS = Said(
    "tests/params/test_params_geometry.py",
    Fault("a chunk rounded down", "params/spec.py", "chunk = -(-size // parts)", "chunk = size // parts"),
    Fault(
        "the last chunk not shortened",
        "params/spec.py",
        "min(chunk, size - offset)",
        "chunk",
    ),
    Fault(
        "copies ignored in block",
        "params/spec.py",
        "place, found, start, at = axis.rank // cut.copies, ",
        "place, found, start, at = axis.rank, ",
    ),
    Fault(
        "a section that begins where the one before does",
        "params/spec.py",
        "start, at = start + size, at + chunk",
        "at = at + chunk",
    ),
    Fault("copies ignored in owned", "params/spec.py", "position[a] % cut[a] == 0 if a in cut", "True if a in cut"),
    Fault(
        "rows of a stack counted without their padding",
        "params/declare.py",
        "row += block.stored[0] if block.stored else 1",
        "row += block.shape[0] if block.shape else 1",
    ),
    Fault(
        "padding not zero",
        "params/values.py",
        "stored = stored.zero_()",
        "stored = stored.fill_(0.5)",
    ),
    Fault("an undeclared parameter passed over", "params/declare.py", "    if unknown:\n", "    if False:\n"),
)

LEARNING_RATE = Said(
    "tests/train/test_train_learning_rate.py",
    Fault(
        "a warm-up that counts from 0",
        "train/learning_rate.py",
        "peak * (update / warmup)",
        "peak * ((update - 1) / warmup)",
    ),
    Fault(
        "a decay that starts at 0 instead of after the warm-up",
        "train/learning_rate.py",
        "start = warmup\n",
        "start = 0\n",
    ),
    Fault(
        "a cooldown that begins one update early",
        "train/learning_rate.py",
        'end - self._known(self.cooldown, "cooldown")',
        'end - self._known(self.cooldown, "cooldown") - 1',
    ),
    Fault(
        "a floor that is not reached",
        "train/learning_rate.py",
        "/ (end - start)",
        "/ (end - start + 1)",
    ),
    Fault("a floor that is passed", "train/learning_rate.py", "if update > end:", "if update > end + 1:"),
    Fault(
        "half a cosine",
        "train/learning_rate.py",
        "0.5 * (math.cos(math.pi * done) + 1)",
        "math.cos(math.pi / 2 * done)",
    ),
)

STOP = Said(
    "tests/initialize/test_initialize_stop.py",
    Fault(
        "a terminal that closes and has the run started again",
        "initialize/stop.py",
        "self._signal in LEAVE",
        "self._signal in LEAVE[:2]",
    ),
    Fault(
        "a run under nohup that ends with its terminal",
        "initialize/stop.py",
        "signal.getsignal(signal.SIGHUP) is signal.SIG_IGN",
        "False",
    ),
)

RECORD = Said(
    "tests/train/test_train_record.py",
    Fault(
        "lines after the step kept",
        "train/metrics_file.py",
        "for row in read_rows(path) if _before(row, after)]",
        "for row in read_rows(path)]",
    ),
    Fault(
        "a line cut by the crash glued to the next",
        "train/rows_file.py",
        "            temporary.replace(path)\n",
        "",
    ),
    Fault(
        "a line cut by the crash that cannot be read",
        "train/metrics_file.py",
        "except (ValueError, RecursionError):",
        "except KeyError:",
    ),
    Fault("a new run that appends", "train/metrics_file.py", "if after else []", "if after else read_rows(path)"),
    Fault(
        "a crash while the old lines are copied that loses them",
        "train/rows_file.py",
        'path.with_name(path.name + ".tmp")',
        "path",
    ),
    Fault(
        "rows that a full disk loses though there is room again",
        "train/rows_file.py",
        "            self._full = True\n",
        "            self._full = True\n            self._waiting.clear()\n",
    ),
)

DROPOUT = Said(
    "tests/models/test_models_dropout.py",
    Fault(
        "a mask that knows the row of the microbatch in place of the sample",
        "tensor_parallel/dropout.py",
        "dropped(self.keys, structure.samples,",
        "dropped(self.keys, torch.arange(len(structure.samples)),",
    ),
    Fault("the same mask for every layer", "tensor_parallel/dropout.py", 'f"dropout/{name}"', '"dropout"'),
    Fault(
        "the same mask for every channel of four",
        "random.py",
        "words.view(torch.int16)[..., low : low + width]",
        "words.view(torch.int16)[..., ::4].repeat_interleave(4, -1)[..., low : low + width]",
    ),
    Fault(
        "no scaling by 1 / (1 - p)",
        "tensor_parallel/dropout.py",
        " * (1 / (1 - chance(self.p)))",
        "",
    ),
    Fault(
        "dropout in evaluation",
        "tensor_parallel/dropout.py",
        "not (self.training and torch.is_grad_enabled())",
        "False",
    ),
    Fault(
        "a recomputation that draws anew",
        "tensor_parallel/dropout.py",
        "x.shape[-1], self.p)",
        "x.shape[-1], self.p).roll(setattr(self, 'drawn', getattr(self, 'drawn', 0) + 1) or self.drawn, -1)",
    ),
)

NORM = Said(
    "tests/distributed/test_distributed_norm.py",
    Fault(
        "padding counted",
        "distributed/norm.py",
        "        for _, view in each.pieces\n",
        "        for view in [each.flat]\n",
    ),
    Fault(
        "a copy of a key/value head counted twice",
        "params/spec.py",
        "position[a] % cut[a] == 0 if a in cut",
        "True if a in cut",
    ),
    Fault(
        "a copy of a tied embedding counted twice",
        "distributed/norm.py",
        'name.partition(".")[0] not in repeated}',
        'name.partition(".")[0] not in ("embed", *repeated)}',
    ),
    Fault(
        "a replicated norm counted once per rank",
        "distributed/norm.py",
        'name.partition(".")[0] not in repeated}',
        'name.partition(".")[0] not in ("tp", *repeated)}',
    ),
    Fault(
        "squares not summed over the pipeline",
        "distributed/norm.py",
        'if everyone else ("tp", "pp")',
        'if everyone else ("tp",)',
    ),
    Fault("partial sums left out", "distributed/partial.py", "if axis.size == 1:", "if True:"),
    Fault(
        "a short gradient that is lengthened", "distributed/norm.py", "(norm + 1e-6)).clamp(max=1.0)", "(norm + 1e-6))"
    ),
    Fault("no limit that stops all", "distributed/norm.py", " if limit > 0 else None", ""),
)

BUCKETS = Said(
    "tests/distributed/test_distributed_data_parallel.py",
    Fault(
        "a bucket that is not sent",
        "distributed/bucket.py",
        "            self._work = all_reduce_(self.grads, self.axis)\n",
        "            self._work = None\n",
    ),
    Fault(
        "a bucket that is sent twice",
        "distributed/data_parallel.py",
        "            if bucket.due:\n",
        "            if True:\n",
    ),
    Fault(
        "a bucket that is sent before its last gradient",
        "distributed/data_parallel.py",
        "while self._unsent and self._unsent[0].full:",
        "while self._unsent:",
    ),
    Fault(
        "gradients added in bf16",
        "distributed/bucket.py",
        "torch.promote_types(first.dtype, torch.float32)",
        "first.dtype",
    ),
    Fault("hooks left behind", "distributed/data_parallel.py", "            hook.remove()\n", "            pass\n"),
    Fault(
        "buckets sent in the order in which they fill",
        "distributed/data_parallel.py",
        """        while self._unsent and self._unsent[0].full:
            self._send(self._unsent.popleft())
""",
        """        for bucket in [each for each in self._unsent if each.full]:
            self._unsent.remove(bucket)
            self._send(bucket)
""",
    ),
    Fault(
        "moments shared between buckets",
        "distributed/optimizer.py",
        "        # The forward uses the last bucket first: what",
        """        longest = max(self.state["exp_avg"], key=len, default=None)
        self.state["exp_avg"] = [longest[: len(master)] for master in self.masters]
        # The forward uses the last bucket first: what""",
    ),
    Fault(
        "weight decay on biases",
        "distributed/optimizer.py",
        "self.rule.weight_decay if item.weight_decay else 0.0",
        "self.rule.weight_decay",
    ),
)

FLASH = Said(
    "tests/attention/test_attention_flash.py",
    Fault(
        "an output in another order in memory",
        "attention/flash.py",
        "torch.empty((s, b, heads, d), dtype=q.dtype, device=q.device).transpose(0, 1)",
        "torch.empty((b, s, heads, d), dtype=q.dtype, device=q.device)",
    ),
    Fault("keys and values exchanged", "attention/flash.py", "_flash_attn_fwd(q, k, v,", "_flash_attn_fwd(q, v, k,"),
    Fault(
        "a backward that is told of another output",
        "attention/flash.py",
        "q, k, v, y, dy, lse, causal",
        "q, k, v, 2 * y, dy, lse, causal",
    ),
)

DIRECT = Said(
    "tests/distributed/test_distributed_main_gradients.py",
    Fault(
        "what is deferred forgotten at the end of a step",
        "distributed/data_parallel.py",
        "        self._main_gradients.flush()\n        self.require_gradients",
        "        self.require_gradients",
    ),
    Fault(
        "what an earlier backward deferred counted among the last gradients",
        "distributed/data_parallel.py",
        "        self._main_gradients.flush()  # of an earlier backward: not among the last ones\n",
        "",
    ),
    Fault(
        "what a failed step deferred added in the next",
        "distributed/main_gradients.py",
        "        self.deferred.clear()\n        self._added.clear()",
        "        self._added.clear()",
    ),
    Fault(
        "what is deferred lost to the next",
        "deferred.py",
        "        self.flush()\n        self._behind = job\n",
        "        self._behind = job\n",
    ),
    Fault(
        "a gradient recorded by autograd", "distributed/main_gradients.py", "if torch.is_grad_enabled():", "if False:"
    ),
)

OVERLAP = Said(
    "tests/tensor_parallel/test_tensor_parallel_overlap.py",
    Fault(
        "rows of another rank multiplied in place of this one's",
        "tensor_parallel/overlap.py",
        "begin, end = tp.rank * n, (tp.rank + 1) * n",
        "begin, end = 0, n",
    ),
    Fault(
        "a first part of a product that waits for the message",
        "tensor_parallel/overlap.py",
        "    _multiply(x, weight, bias, y[begin:end])\n    whole = coming.wait()\n",
        "    whole = coming.wait()\n    _multiply(x, weight, bias, y[begin:end])\n",
    ),
    Fault(
        "a weight gradient that is not deferred",
        "tensor_parallel/linear.py",
        "build.accumulators.defer if build.tp.size > 1 else",
        "build.accumulators.defer if build.tp.size > 8 else",
    ),
    Fault(
        "a message of the backward that nothing passes behind",
        "tensor_parallel/build.py",
        "nothing if self.accumulators is None or self.tp.size == 1 else self.accumulators.flush",
        "nothing",
    ),
    Fault(
        "what is gathered again waited for at once",
        "tensor_parallel/linear.py",
        "recomputed = all_gather_async(x, build.tp) if",
        "recomputed = AsyncTensor(all_gather_async(x, build.tp).wait()) if",
    ),
)

LAYERS = Said(
    "tests/tensor_parallel/test_tensor_parallel_layers.py",
    Fault(
        "copy_to without its sum",
        "tensor_parallel/mappings.py",
        "return reduce_from(dy, ctx.tp, ctx.overlap_with)",
        "return dy",
    ),
    Fault(
        "reduce_from that sums in its backward too",
        "tensor_parallel/mappings.py",
        "return copy_to(dy, ctx.tp, ctx.overlap_with), None, None",
        "return all_reduce(dy, ctx.tp), None, None",
    ),
    Fault(
        "a row bias added on every rank before the sum",
        "tensor_parallel/layers.py",
        """            y = linear(x, self.weight, None, self.build, column=False)
        if self.bias is None:
""",
        """            return linear(x, self.weight, self.bias, self.build, column=False)
        if self.bias is None:
""",
    ),
    Fault(
        "partial gradients of norms and biases not declared",
        "tensor_parallel/layers.py",
        'sum_grad=("tp",) if sequence_parallel else ()',
        "sum_grad=()",
    ),
    Fault(
        "copies of key/value rows not declared as partial",
        "tensor_parallel/layers.py",
        'sum_grad=("tp",) if part.copies > 1 else ()',
        "sum_grad=()",
    ),
    Fault(
        "parts of a stack in another order",
        "tensor_parallel/layers.py",
        "init, weight_decay=True) for p in parts]",
        "init, weight_decay=True) for p in reversed(parts)]",
    ),
)

VOCABULARY = Said(
    "tests/tensor_parallel/test_tensor_parallel_vocab.py",
    Fault(
        "tokens of other ranks looked up in row 0",
        "tensor_parallel/vocab.py",
        "local, mine = localise(tokens.t(), self.start, self.rows)",
        "local, mine = localise(tokens.t(), self.start, self.rows)[0], torch.ones_like(tokens.t(), dtype=torch.bool)",
    ),
    Fault(
        "the shift by the maximum of this rank alone",
        "tensor_parallel/cross_entropy.py",
        "highest = all_reduce_max(reduce(torch.maximum, (top for top, *_ in found)), tp)",
        "highest = reduce(torch.maximum, (top for top, *_ in found))",
    ),
    Fault(
        "the exponentials not summed over the ranks",
        "tensor_parallel/cross_entropy.py",
        "sums = all_reduce(tree_sum(summed), tp)",
        "sums = torch.stack([tree_sum(summed)[0], *all_reduce(tree_sum(summed)[1:], tp)])",
    ),
    Fault(
        "the label's logit not summed over the ranks",
        "tensor_parallel/cross_entropy.py",
        "sums = all_reduce(tree_sum(summed), tp)",
        "sums = torch.stack([all_reduce(tree_sum(summed)[:1], tp)[0], *tree_sum(summed)[1:]])",
    ),
    Fault(
        "padding that takes part",
        "tensor_parallel/cross_entropy.py",
        "valid.append(logits.view(*x[part].shape[:2], -1)[..., :here])",
        "valid.append(logits.view(*x[part].shape[:2], -1))",
    ),
    Fault(
        "a gradient without the label's one subtracted",
        "tensor_parallel/loss_formulas.py",
        "((softmax - target) * dy",
        "(softmax * dy",
    ),
    Fault(
        "a piece of the logits whose gradient of the weight overwrites that of the piece before",
        "tensor_parallel/cross_entropy.py",
        "of.gemms.add(dw, first_microbatch and part.start == 0, grads, rows)",
        "of.gemms.add(dw, True, grads, rows)",
    ),
    Fault(
        "a gradient that does not see what follows the loss",
        "tensor_parallel/cross_entropy.py",
        "            dw = (made[0] * scale",
        "            scale = torch.ones_like(scale)\n            dw = (made[0] * scale",
    ),
    Fault(
        "a second derivative that is silently incomplete",
        "tensor_parallel/cross_entropy.py",
        "    @once_differentiable  # it takes logits and loss for constants\n",
        "",
    ),
)

LOSS = Said(
    "tests/tensor_parallel/test_tensor_parallel_loss.py",
    Fault(
        "smoothing over the words of one rank",
        "tensor_parallel/cross_entropy.py",
        "sums = all_reduce(tree_sum(summed), tp)",
        "sums = torch.stack([*all_reduce(tree_sum(summed)[:2], tp), *tree_sum(summed)[2:]])",
    ),
    Fault(
        "the smoothed target left out of the gradient",
        "tensor_parallel/loss_formulas.py",
        "    if smoothing:\n        target =",
        "    if False:\n        target =",
    ),
    Fault(
        "a z-loss that forgets the shift by the highest logit",
        "tensor_parallel/loss_formulas.py",
        "terms.z * (log + highest).square()",
        "terms.z * log.square()",
    ),
    Fault(
        "a z-loss without its gradient",
        "tensor_parallel/loss_formulas.py",
        "    if z:  # d (lse^2)",
        "    if False:  # d (lse^2)",
    ),
    Fault(
        "a label to be ignored that counts",
        "tensor_parallel/loss_formulas.py",
        "return dy if terms.ignore is None else dy.masked_fill(labels == terms.ignore, 0.0)",
        "return dy",
    ),
    Fault(
        "terms that an evaluation counts",
        "tensor_parallel/cross_entropy.py",
        "terms = self.terms if trained else self.plain",
        "terms = self.terms",
    ),
    Fault(
        "losses of tokens whose gradient forgets what each weighs",
        "tensor_parallel/token_losses.py",
        "exps[part], dy[part])",
        "exps[part], torch.ones_like(dy[part]))",
    ),
)

TRAFFIC = Said(
    "tests/collective_trace/test_collective_trace_faults.py",
    Fault(
        "a comparison of shapes left out",
        "collective_trace/call.py",
        "else self.op, shape, self.dtype)",
        "else self.op, (), self.dtype)",
    ),
    Fault(
        "the message of a peer shown in place of the table",
        "collective_trace/check.py",
        'raise PeerStoppedError(f"rank',
        'raise ValueError(f"rank',
    ),
    only="test_a_fault_ends_all_ranks_with_one_table_that_names_the_rank_and_the_line[wrong_shape]",
)

LAYOUTS_OF_DROPOUT = Said(
    "tests/verify/test_verify_dropout.py",
    Fault(
        "tensor-parallel ranks that all draw the first positions under sequence parallelism",
        "tensor_parallel/dropout.py",
        "self.tp.rank if self.sequence_parallel else 0",
        "0",
    ),
    Fault(
        "tensor-parallel ranks that draw different positions without it",
        "tensor_parallel/dropout.py",
        "self.tp.rank if self.sequence_parallel else 0",
        "self.tp.rank",
    ),
    Fault(
        "a mask that knows the row of the microbatch in place of the sample",
        "tensor_parallel/dropout.py",
        "dropped(self.keys, structure.samples,",
        "dropped(self.keys, torch.arange(len(structure.samples)),",
    ),
    Fault(
        "a mask that knows the row of the rank in place of the sample",
        "tensor_parallel/dropout.py",
        "mask = dropped(self.keys, structure.samples,",
        """self.rows = getattr(self, "rows", 0) + len(structure.samples)
        mask = dropped(self.keys, torch.arange(self.rows - len(structure.samples), self.rows),""",
    ),
)

COMMS = Said(
    "tests/verify/test_verify_comms.py",
    Fault(
        "an all-reduce in place of a reduce-scatter",
        "tensor_parallel/mappings.py",
        "return reduce_scatter(x, tp, 0, overlap_with)",
        "return all_reduce(x, tp).chunk(tp.size, 0)[tp.rank]",
    ),
    Fault(
        "a gradient reduced twice",
        "distributed/data_parallel.py",
        "            if bucket.due:\n",
        "            if True:\n",
    ),
    Fault("a sum of partial gradients left out", "distributed/partial.py", "if axis.size == 1:", "if True:"),
    Fault(
        "a border of tensor parallelism that communicates in both directions",
        "tensor_parallel/mappings.py",
        "return copy_to(dy, ctx.tp, ctx.overlap_with), None, None",
        "return all_reduce(dy, ctx.tp), None, None",
    ),
)

FP8 = Said(
    "tests/tensor_parallel/test_tensor_parallel_fp8.py",
    Fault(
        "a scale that the ranks of tp do not agree on",
        "tensor_parallel/fp8.py",
        "return all_reduce_max(scale, self.tp) if cut else scale",
        "return scale",
    ),
    Fault(
        "gradients of activations in the format of the weights",
        "tensor_parallel/fp8.py",
        """        scale = self.agreed(self.scale(flat, dtype=E5M2), cut=column)
        plain, across = self.quantize_both(flat, scale, dtype=E5M2)
""",
        """        scale = self.agreed(self.scale(flat, dtype=E4M3), cut=column)
        plain, across = self.quantize_both(flat, scale, dtype=E4M3)
""",
    ),
    Fault(
        "one scale for all rows",
        "tensor_parallel/fp8.py",
        "return meaning(x.abs().amax(-1, keepdim=True), E4M3)",
        "return meaning(x.abs().amax().expand(x.shape[0], 1), E4M3)",
    ),
    Fault(
        "a weight that is not quantized anew after an update",
        "tensor_parallel/fp8.py",
        """        finally:
            self._steady = None
""",
        """        finally:
            pass
""",
    ),
    Fault(
        "weight gradients of later microbatches not added",
        "tensor_parallel/fp8.py",
        "product(total.dtype, out=total) if first_microbatch else self.add_(total, product(torch.bfloat16))",
        "product(total.dtype, out=total)",
    ),
    Fault(
        "what is made again quantized by another scale",
        "tensor_parallel/fp8.py",
        "return kept[0], self.quantize_transposed(_bare(x), kept[0], dtype=E4M3)",
        "return kept[0], self.quantize_transposed(_bare(x), 2 * kept[0], dtype=E4M3)",
    ),
    Fault(
        "a scale that is no power of two",
        "tensor_parallel/fp8.py",
        ".view(torch.int32) + PAST_1_75) & EXPONENT",
        ".view(torch.int32))",
    ),
)

SAID = (
    COLLECTIVES,
    PARAMS,
    LEARNING_RATE,
    RECORD,
    STOP,
    DROPOUT,
    NORM,
    BUCKETS,
    DIRECT,
    OVERLAP,
    FLASH,
    LAYERS,
    LOSS,
    VOCABULARY,
    TRAFFIC,
    LAYOUTS_OF_DROPOUT,
    COMMS,
    MODEL,
    POINTWISE,
    FAST,
    FP8,
    HEAD,
    KERNELS,
    KERNELS_FP8,
    KERNELS_HEAD_NORM,
    KERNELS_LOSS,
    KERNELS_ADAMW,
    KERNELS_EMBEDDING,
    READBACK,
    METERED,
    CONSENSUS,
    EARLY,
    BUFFERS,
    ATTACK,
    EXCHANGE,
    FAILURES,
    STORE,
    COUNTS,
    OWN_PROGRAM,
    PACE,
    SOUND,
    BASH,
    SCRIPTS,
    FLAT,
    SECTIONS,
    SHARDING,
    GROUPING,
    GATHERED_IN_FP8,
    RULES,
    PARAM_GROUPS,
    MUON,
    WIRE,
    RESIDENCE,
    HOST,
    LEDGER,
    LEDGER_HALVES,
    STEP_TIME,
    PEAK,
    PLANNER,
    QUANTIZED,
    LOOP,
    NOT_FINITE,
    OWN_LOOPS,
    HABITS,
    CHECKPOINTS,
    FAMILIES,
    CONFIG,
    FILES,
    IN_AND_OUT,
    CACHE,
    SCHEDULES,
    CUT_BLOCKS,
    PROVEN_LATE,
    MESSAGES,
    COSTS,
    TUNING,
    SHARE,
    ADAPTERS,
    ADAPTER_IN,
    TOKENIZERS,
    CHAT,
    CONTEXT_ATTENTION,
    CONTEXT_NEEDED,
    DEAL,
    CONTEXT_LAYOUTS,
    PACKED,
    OFFLOAD,
    CUT,
    TILE,
    WINDOWED,
    LAUNCHES,
    UNGUARDED,
    AUTOGRAD,
    REGION,
    BLOCK_REGIONS,
    LAYOUTS,
    EXACT,
    ROUTER,
    CROSSING,
    SENT,
    BESIDE,
    KEPT,
    HALVES,
    FP8_EXPERTS,
    KERNELS_EXPERTS,
    ASKED,
    PEERS,
    PEERS_LAYOUTS,
    PEERS_MEMORY,
    TEXT_FILES,
    ELSEWHERE,
    LOST,
    PARTS,
    MIXTURE,
    STREAMS,
    RUNS,
    INDEXED,
    FOREIGN,
    PLANS,
    RECOMPUTE,
    SHAPES,
    CLAUSES,
)
