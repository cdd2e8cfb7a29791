"""As `verify_said`: rows on several ranks, and rows of several documents."""

from __future__ import annotations

from verify_fault import Fault, Said

CONTEXT_ATTENTION = Said(
    "tests/context_parallel/test_context_parallel_attention.py",
    Fault(
        "a merge in bf16",
        "context_parallel/parts.py",
        "wide = torch.promote_types(self._like.dtype, torch.float32)",
        "wide = self._like.dtype",
    ),
    Fault(
        "a merge that forgets to rescale",
        "context_parallel/merge.py",
        "y.copy_(x * p + z * q)",
        "y.copy_(x + z * q)",
    ),
    Fault(
        "gradients of keys that are not summed over ranks",
        "context_parallel/exchange.py",
        "own.add_(behind.wait())",
        "own",
    ),
    Fault(
        "gradients that travel with the wrong block",
        "context_parallel/exchange.py",
        "            behind = shift_async(own, self.axis)\n",
        "            behind = shift_async(own, self.axis) if step else AsyncTensor(own)\n",
    ),
    Fault(
        "keys along the diagonal that are seen twice",
        "sequence/tiles.py",
        "query.place + (0 if before else query.length)",
        "query.place + query.length",
    ),
    Fault(
        "half of the diagonal without a gradient",
        "context_parallel/exchange.py",
        "squares[len(squares) // 2 :]",
        "squares[len(squares) :]",
    ),
    Fault(
        "gradients of some heads that go home as those of others",
        "context_parallel/exchange.py",
        "zip(dkv.chunk(len(leaving), 2), leaving,",
        "zip(dkv.chunk(len(leaving), 2), leaving[::-1],",
    ),
    Fault(
        "a window counted from the tile",
        "attention/tile.py",
        "(behind >= 0) & (behind < tile.window)",
        "(behind >= 0) & (behind - tile.offset < tile.window)",
    ),
    Fault(
        "documents that see one token of the one before",
        "structure.py",
        "dealt = [deal(",
        "starts = np.where((starts > 0) & (starts < np.arange(length)), starts - 1, starts)\n        dealt = [deal(",
    ),
    Fault(
        "copies of key/value heads that keep their own gradients",
        "context_parallel/attention.py",
        "x.repeat_interleave(copies, 2) if copies > 1 else x",
        "torch.cat([x.repeat_interleave(copies, 2)[:, :, :1], x.repeat_interleave(copies, 2)[:, :, 1:].detach()], 2)",
    ),
    Fault(
        "ranks that exchange heads and all have the first sinks",
        "context_parallel/attention.py",
        "sinks.chunk(a)[self.inner.rank]",
        "sinks.chunk(a)[0]",
    ),
)

CONTEXT_NEEDED = Said(
    "tests/context_parallel/test_context_parallel_needed.py",
    Fault(
        "keys of other documents that are sent",
        "sequence/needed.py",
        "edges[start if window",
        "edges[0 if window",
    ),
    Fault(
        "a window that the plan does not know",
        "sequence/needed.py",
        "start if window is None else max(start, place - window + 1)",
        "start",
    ),
    Fault(
        "a gradient that only the last rank that needs a key adds",
        "context_parallel/needed.py",
        "part.index_add_(0, at, of_rank)",
        "part.index_copy_(0, at, of_rank)",
    ),
    Fault(
        "rows of a microbatch whose keys change places",
        "context_parallel/needed.py",
        "sent.append(_counted(theirs.slots[theirs.home == rank], of, b))",
        "sent.append(_counted(theirs.slots[theirs.home == rank], of[::-1], b))",
    ),
)

DEAL = Said(
    "tests/sequence/test_sequence_deal.py",
    Fault(
        "a deal by tokens in place of work",
        "sequence/deal.py",
        "sums = np.add.reduceat(amounts, ends - sizes, axis=1)",
        "sums = np.tile(sizes, (len(amounts), 1))",
    ),
    Fault(
        "a length that is rounded down",
        "sequence/deal.py",
        "return -(-seq_len // (ranks * multiple)) * multiple",
        "return max(1, seq_len // (ranks * multiple)) * multiple",
    ),
    Fault(
        "a document that is cut off at the end of a block",
        "sequence/tiles.py",
        "(run.place, rank * length + run.slot, run)",
        "(run.place, rank * length + run.slot, run._replace(start=max(run.start, run.place)))",
    ),
    Fault(
        "a window that the work does not know",
        "sequence/deal.py",
        "before if window is None else np.minimum(before, window)",
        "before",
    ),
)

CONTEXT_LAYOUTS = Said(
    "tests/context_parallel/test_context_parallel_layouts.py",
    Fault(
        "a loss that each rank of cp divides by its own tokens",
        "train/text.py",
        'return all_reduce(own, state.axis("dp", "cp"))',
        'return all_reduce(own, state.axis("dp", "cp")) / state.axis("cp").size',
    ),
    Fault(
        "labels rolled across the cut",
        "structure.py",
        "_taken(batch.labels, index, 0)",
        "_taken(batch.tokens, index, 0).roll(-1, 1)",
    ),
    Fault(
        "positions counted from the first slot",
        "structure.py",
        "positions=torch.where(places < length, places - begins, 0)",
        "positions=torch.where(places < length, torch.arange(slots), 0)",
    ),
    Fault(
        "dropout by slot in place of the place in the row",
        "structure.py",
        "return self._of(self.places, part, size, device)",
        "return self._of(None, part, size, device)",
    ),
    Fault(
        "sequence-parallel ranks of cp that all have the first slots",
        "structure.py",
        "return given[part * size : (part + 1) * size]",
        "return given[:size]",
    ),
    Fault(
        "a last token of a document that predicts the next document",
        "verify/session.py",
        "keep[:, :-1] &= ~begins[:, 1:]",
        "pass",
    ),
)

PACKED = Said(
    "tests/data/test_data_packed.py",
    Fault(
        "a document that begins in the slot before",
        "data/packed.py",
        "starts[n, at] = said[1:] & unused == 0, end",
        "starts[n, at] = said[1:] & unused == 0, max(end - 1, 0)",
    ),
    Fault(
        "a first token that is not predicted",
        "data/packed.py",
        "firsts = begins - ended",
        "firsts = begins",
    ),
    Fault(
        "a piece that fits and is not put in",
        "sequence/packing.py",
        "if place == len(sizes):",
        "if True:",
    ),
    Fault(
        "pieces of one length that fill a row beyond its end",
        "sequence/packing.py",
        "each = size // length",
        "each = -(-size // length)",
    ),
    Fault(
        "an evaluation that leaves a document out",
        "data/evaluation.py",
        "if packed is None else len(packed)",
        "if packed is None else len(packed) - 1",
    ),
)

OFFLOAD = Said(
    "tests/models/test_models_offload.py",
    Fault(
        "an input that keeps its memory",
        "models/offload.py",
        "        self.x.untyped_storage().resize_(0)\n",
        "",
    ),
    Fault(
        "one that comes back as zeros",
        "models/offload.py",
        "self._done = self._copy(self.x.data, self.host)",
        "self._done = self._copy(self.x.data, torch.zeros_like(self.host))",
    ),
    Fault(
        "the last block, whose input stays, not asking for the one before",
        "models/offload.py",
        "            self.before.fetch()\n\n\nclass _Away",
        "            pass\n\n\nclass _Away",
    ),
)

CUT = Said(
    "tests/structure/test_structure_cut.py",
    Fault(
        "a rank that takes another's slots",
        "structure.py",
        "np.stack([each[self.rank] for each in dealt])",
        "np.stack([each[0] for each in dealt])",
    ),
    Fault(
        "a slot beyond the row that counts",
        "structure.py",
        "_taken(batch.loss_mask, index, False)",
        "_taken(batch.loss_mask, index, True)",
    ),
    Fault(
        "a structure that forgets where its documents begin when it goes to a device",
        "structure.py",
        "samples=samples, places=places, positions=positions)",
        "samples=samples, places=places, positions=positions, held=())",
    ),
    Fault(
        "numbers of documents that are taken for where they begin",
        "structure.py",
        "    if len(wrong):",
        "    if len(wrong) > starts.size:",
    ),
    Fault(
        "layers of two windows that are even only together",
        "structure.py",
        "deal(work(each, self.windows), self.ranks, slots, loads)",
        "deal(np.atleast_2d(work(each, self.windows)).sum(0), self.ranks, slots, loads.sum(0))",
    ),
)

WINDOWED = Said(
    "tests/attention/test_attention_windowed.py",
    Fault(
        "a window that is one key too wide",
        "attention/windowed.py",
        "Tile(row, row, 0, scores.window)",
        "Tile(row, row, 0, (scores.window or 0) + 1)",
    ),
    Fault(
        "a window that looks ahead",
        "attention/windowed.py",
        "Tile(row, row, 0, scores.window)",
        "Tile(row, row, 1, scores.window)",
    ),
    Fault(
        "scores in a window without their scale",
        "attention/windowed.py",
        "scores.window), scores\n",
        "scores.window), Scores()\n",
    ),
)

LAUNCHES = Said(
    "tests/kernels/test_kernels_launches.py",
    Fault(
        "a binary for multiples of sixteen that is given others",
        "kernels/launches.py",
        "(x % _ALIGNED == 0, -_INT32 <= x < _INT32)",
        "-_INT32 <= x < _INT32",
    ),
    Fault(
        "a constant of an earlier launch",
        "kernels/launches.py",
        "if constant or type(x) is not int or x == 1:",
        "if type(x) is not int or x == 1:",
    ),
)

AUTOGRAD = Said(
    "tests/autograd/test_autograd_function.py",
    Fault(
        "a gradient of gradients that is silently another",
        "autograd/function.py",
        "careful(ctx, *gradients) if torch.is_grad_enabled() else backward",
        "backward",
    ),
)

REGION = Said(
    "tests/autograd/test_autograd_region.py",
    Fault(
        "a gradient of one of two uses dropped",
        "autograd/region.py",
        "dx if before is None else before + dx",
        "dx",
    ),
    Fault(
        "what a later function takes let go of",
        "autograd/region.py",
        "            later |= here\n",
        "",
    ),
    Fault(
        "a gradient set where it is added",
        "autograd/region.py",
        "total.copy_(gradient) if first_microbatch else total.add_(gradient)",
        "total.copy_(gradient)",
    ),
    Fault(
        "a backward of a weight that was written since",
        "autograd/region.py",
        "if ctx.versions != [",
        "if not ctx.versions and [",
    ),
)

BLOCK_REGIONS = Said(
    "tests/models/test_models_regions.py",
    Fault(
        "the residual left out",
        "models/block_regions.py",
        "region.add_linear(torch.add, _both, past, x)",
        "region.add_linear(torch.add, _both, x, x)",
    ),
    Fault(
        "an adapter passed over",
        "models/block_regions.py",
        "return layer.lora is None and layer.bias is None",
        "return layer.bias is None",
    ),
    Fault(
        "hooks that hear nothing",
        "models/block_regions.py",
        " or any(self._hooks)",
        "",
    ),
)

UNGUARDED = Said(
    "tests/kernels/test_kernels_unguarded.py",
    Fault(
        "what is written in place not told to autograd",
        "kernels/unguarded.py",
        "None if written or _alias",
        "None if _alias",
    ),
    Fault(
        "two arguments taken for one",
        "kernels/unguarded.py",
        "if len(known) >= _SIGNATURES or not _distinct(tensors):",
        "if len(known) >= _SIGNATURES:",
    ),
)

TILE = Said(
    "tests/attention/test_attention_tile.py",
    Fault(
        "a window of FlashAttention that is one key too wide",
        "attention/tile.py",
        "tile.window - 1 - ahead",
        "tile.window - ahead",
    ),
    Fault(
        "a tile that is computed in parts of which one begins anew",
        "attention/tile.py",
        "behind = torch.arange(part.start, part.stop, device=q.device)[:, None]",
        "behind = torch.arange(part.stop - part.start, device=q.device)[:, None]",
    ),
)
