"""As `verify_said`: experts."""

from __future__ import annotations

from verify_fault import Fault, Said

LAYOUTS = Said(
    "tests/experts/test_experts_layouts.py",
    Fault(
        "gradients of experts summed over all data-parallel ranks",
        "experts/layer.py",
        'replicas=("edp",)',
        'replicas=("dp", "cp")',
    ),
    Fault(
        "a router whose gradient is not summed over tensor-parallel ranks",
        "experts/router.py",
        'Init(std=config.init_std), sum_grad=("tp",))',
        "Init(std=config.init_std))",
    ),
    Fault(
        "a balance loss of the counts of one microbatch",
        "experts/gates.py",
        "share = before.to(logits.dtype) / before.sum().clamp(min=1)",
        "share = hits.sum((0, 1)).to(logits.dtype) / experts.numel()",
    ),
    Fault(
        "tokens that every tensor-parallel rank sends",
        "experts/layer.py",
        "shared_out = not build.sequence_parallel and tp.size > 1",
        "shared_out = False",
    ),
    Fault(
        "parts of a cut expert that are not added up",
        "experts/rows.py",
        "for part in back[:, :, k]:",
        "for part in back[:1, :, k]:",
    ),
    Fault(
        "a router that counts where it has a backward alone",
        "experts/router.py",
        "        elif torch.is_grad_enabled() and not in_backward():",
        "        elif False:",
    ),
    Fault(
        "slots without a token that are counted",
        "experts/gates.py",
        "if real is None else hits & real[:, None, None]",
        "if real is None else hits",
    ),
    Fault(
        "weights let go while a half of the microbatch still reads them",
        "models/halves.py",
        "        return Halves(self.both, self.both[1].passed)\n\n    def each",
        "        return Halves(self.both, self.both[0].passed)\n\n    def each",
    ),
    Fault(
        "two halves that are announced as one use",
        "models/transformer.py",
        "replace(build, uses=2) if halves else build",
        "build",
    ),
    Fault(
        "places of tokens that leave out what comes from ranks before",
        "experts/plan.py",
        "(tokens.cumsum(0) - tokens).to(torch.int32)",
        "torch.zeros_like(tokens, dtype=torch.int32)",
    ),
    Fault(
        "a capacity of what one rank of cp holds",
        "train/stages.py",
        '            cp=state.axis("cp"),\n',
        "",
    ),
)

EXACT = Said(
    "tests/experts/test_experts_exact.py",
    Fault(
        "experts of other ranks left out of the norm",
        "params/spec.py",
        "same = [*(axis for axis in self.view if axis not in self.apart),",
        'same = [*(axis for axis in self.view if axis != "pp"),',
    ),
    Fault(
        "gradients of experts scaled by ep",
        "experts/grouped.py",
        "def write(total: Tensor, first_microbatch: bool) -> None:\n",
        "def write(total: Tensor, first_microbatch: bool) -> None:\n"
        "            every[0].dy.mul_(self.build.experts.ep.size)\n",
    ),
    Fault(
        "a weight gradient of this rank's own rows alone",
        "experts/grouped.py",
        "for each in some for tensor in each",
        "for each in some[:1] for tensor in each",
    ),
    Fault(
        "an expert without tokens that keeps the gradient of the step before",
        "experts/grouped.py",
        "        if first:\n            each.zero_()",
        "",
    ),
    Fault(
        "counts of the last step that a checkpoint forgets",
        "experts/balance.py",
        'kept: list[tuple[str, Tensor]] = [(f"counts/{where}", router.state.before)]',
        "kept: list[tuple[str, Tensor]] = []",
    ),
    Fault(
        "counts that a recomputation adds again",
        "experts/router.py",
        "        ctx.save_for_backward(logits, experts, real, kept)\n",
        "        ctx.save_for_backward(logits, experts, real, kept)\n"
        "        router.state.counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())\n",
    ),
    Fault(
        "a weight decay that an expert without tokens is spared",
        "experts/layer.py",
        "weight_decay=len(shape) > 1",
        "weight_decay=False",
    ),
)

ROUTER = Said(
    "tests/experts/test_experts_router.py",
    Fault(
        "a router whose gradient is detached",
        "experts/gates.py",
        "of_chosen = (hits * d[..., None]).sum(1)",
        "of_chosen = torch.zeros_like(logits)",
    ),
    Fault(
        "groups that are ranked by their best score alone",
        "experts/router.py",
        'best = grouped.amax(-1) if c.router_group_score == "max" else grouped.topk(2, -1).values.sum(-1)',
        "best = grouped.amax(-1)",
    ),
    Fault(
        "counts in bf16",
        "experts/balance.py",
        "own.before.copy_(counts[0, n])",
        "own.before.copy_(counts[0, n].bfloat16())",
    ),
    Fault(
        "outputs added in the order in which they arrived",
        "experts/rows.py",
        "return _added(_joined(rows, more), back, weights)",
        "return _added(_joined(rows, more), back.sort(-1).values, weights)",
    ),
    Fault(
        "a bias that weighs",
        "experts/router.py",
        "self._weights(logits.detach(), experts, self.gates)",
        "self._weights(logits.detach() + self.state.bias.to(logits), experts, self.gates)",
    ),
    Fault(
        "tokens beyond the capacity that are kept",
        "experts/capacity.py",
        "before < limit",
        "before <= limit",
    ),
    Fault(
        "a drop that rounding decides",
        "experts/capacity.py",
        "_leading(importance.transpose(0, 1).reshape(b, s * k))",
        "importance.transpose(0, 1).reshape(b, s * k)",
    ),
    Fault(
        "a drop for what another document chose",
        "experts/capacity.py",
        "document[..., None].long() * config.experts + chosen",
        "0 * document[..., None].long() + chosen",
    ),
)

CROSSING = Said(
    "tests/experts/test_experts_crossing.py",
    Fault(
        "tokens that go to ranks without any of their experts",
        "experts/crossing.py",
        "holders.new_zeros((n, ep + 1)",
        "holders.new_ones((n, ep + 1)",
    ),
    Fault(
        "a place that counts other ranks' tokens",
        "experts/crossing.py",
        "places = found - (number.cumsum(0) - number)[:, None]",
        "places = found",
    ),
    Fault(
        "tokens that a rank sends to itself",
        "experts/crossing.py",
        "        goes[me].zero_()\n",
        "",
    ),
)

SENT = Said(
    "tests/experts/test_experts_sent.py",
    Fault(
        "rows that are sent to each rank of a cut expert twice",
        "experts/dispatch.py",
        "        self._under_way[message] = all_to_all_rows_async(rows, splits, plan.exchange, order)",
        "        all_to_all_rows_async(rows, splits, plan.exchange, order).wait()\n"
        "        self._under_way[message] = all_to_all_rows_async(rows, splits, plan.exchange, order)",
    ),
    Fault(
        "latents that cross a border by themselves each",
        "models/latent.py",
        "*latents, k_rotated = low.split_with_sizes(self.latents, -1)",
        "*latents, k_rotated = low.split_with_sizes(self.latents, -1)\n"
        "        k_rotated = enter(k_rotated, b.tp, sequence_parallel=False)",
    ),
    Fault(
        "gradients in bf16 that are gathered in fp32",
        "distributed/wire.py",
        "        all_gather_into(self.sent, total.to(self.sent.dtype), self.axis).wait()\n"
        "        self.x.copy_(self.sent[: self.x.numel()])",
        "        whole = self.sent.to(total.dtype)\n"
        "        all_gather_into(whole, total, self.axis).wait()\n"
        "        self.x.copy_(whole[: self.x.numel()])",
    ),
)

KEPT = Said(
    "tests/experts/test_experts_kept.py",
    Fault(
        "outputs of experts that are kept",
        "experts/output.py",
        "ctx.save_for_backward(gate_up, weight)",
        "ctx.save_for_backward(gate_up, weight, y)",
    ),
    Fault(
        "the activation's output kept beside what it is made from",
        "experts/output.py",
        "ctx.save_for_backward(gate_up, weight)",
        "ctx.save_for_backward(gate_up, weight, a)",
    ),
    Fault(
        "rows kept beside the tokens that they are",
        "experts/layer.py",
        "if of.activation.recompute and not others:",
        "if False:",
    ),
)

HALVES = Said(
    "tests/models/test_models_halves.py",
    Fault(
        "a half that has the positions of the other's rows",
        "structure.py",
        "each if each is None or each.shape[1] == 1 else each[:, rows]",
        "each if each is None or each.shape[1] == 1 else each[:, : rows.stop - rows.start]",
    ),
    Fault(
        "halves joined in the wrong order",
        "models/halves.py",
        "for half in self.both], 1)",
        "for half in reversed(self.both)], 1)",
    ),
    Fault(
        "outputs that begin their way back behind the other half's experts",
        "models/halves.py",
        "frozenset({Stop.ASKED, Stop.SENT, Stop.COMPUTED, Stop.GIVEN}),",
        "frozenset({Stop.ASKED, Stop.SENT, Stop.COMPUTED}),",
    ),
    Fault(
        "rows that are sent when the other half is through with its experts",
        "models/halves.py",
        "frozenset({Stop.SORTED, Stop.ASKED, Stop.SENT, Stop.GIVEN}),",
        "frozenset({Stop.GIVEN}),",
    ),
    Fault(
        "outputs that begin their way back behind a rank's own rows",
        "experts/layer.py",
        "            away.give()\n"
        "        given = give_back(own_gate_up, weighed, of.down_proj, of.activation, own, out_of)\n",
        "        given = give_back(own_gate_up, weighed, of.down_proj, of.activation, own, out_of)\n"
        "        for away in others:\n"
        "            away.give()\n",
    ),
)

FP8_EXPERTS = Said(
    "tests/experts/test_experts_fp8.py",
    Fault(
        "one scale for the columns of all experts",
        "experts/fp8.py",
        "return row_scale(stack.transpose(1, 2))",
        "return row_scale(stack.transpose(1, 2)).amax(0, keepdim=True).expand(len(stack), -1, -1)",
    ),
    Fault(
        "a cut expert whose ranks do not agree on a scale",
        "experts/fp8.py",
        "plain, scale = self.rows(x, cut=not column)",
        "plain, scale = self.rows(x, cut=False)",
    ),
    Fault(
        "weights of experts that are not quantized anew after an update",
        "tensor_parallel/fp8.py",
        "        self._steady = {}\n        try:",
        "        self._steady = vars(self).setdefault('_kept', {})\n        try:",
    ),
)

KERNELS_EXPERTS = Said(
    "tests/kernels/test_kernels_experts.py",
    Fault(
        "a dropped row that is added",
        "kernels/experts.py",
        "mask=here, other=0.0)",
        "mask=here, other=1.0)",
    ),
    Fault(
        "the parts of a cut expert not added up",
        "kernels/experts.py",
        "slot += tl.load(",
        "slot = tl.load(",
    ),
    Fault(
        "columns beyond the first block left out",
        "kernels/experts.py",
        "return block, cdiv(width, block)",
        "return block, 1",
    ),
    Fault(
        "rows of others looked for behind as many of a rank's own",
        "kernels/experts.py",
        "more + (place - own) * width",
        "more + place * width",
    ),
    Fault(
        "what is beside a sum left out",
        "kernels/experts.py",
        "    if added:\n",
        "    if False:\n",
    ),
    Fault(
        "slots added in another order",
        "kernels/experts.py",
        "    for k in tl.static_range(slots):\n        slot",
        "    for k in tl.static_range(slots - 1, -1, -1):\n        slot",
    ),
    Fault(
        "rows of the next expert added",
        "kernels/grouped.py",
        "held = (places < end)[:, None]",
        "held = (places < end + 1)[:, None]",
    ),
    Fault(
        "an expert without rows not set to zero",
        "kernels/grouped.py",
        "if empty and add:",
        "if empty:",
    ),
    Fault(
        "an expert that is chosen twice",
        "kernels/top_k.py",
        'tl.where(expert == found[:, None], -float("inf"), left)',
        "left",
    ),
    Fault(
        "rows of a second part left out",
        "kernels/grouped.py",
        "more_end = tl.load(more_ends + expert)",
        "more_end = more_begin",
    ),
    Fault(
        "rows of an expert whose sources lie in any order",
        "kernels/experts.py",
        "(each // experts < source)",
        "(each // experts > source)",
    ),
    Fault(
        "rows of an expert beyond a block left where they were",
        "kernels/experts.py",
        "for at in range(0, number, block):",
        "for at in range(0, min(number, block), block):",
    ),
    Fault(
        "assignments of blocks before not counted",
        "kernels/counting_sort.py",
        "    base += end - every\n",
        "    base = end - every\n",
    ),
)

ASKED = Said(
    "tests/experts/test_experts_asked.py",
    Fault(
        "places that are looked up by a list of the host",
        "experts/plan.py",
        "torch.stack([of_ep[at[ep]] for ep, _ in axes.places])",
        "self._counts.view(-1, self.local)[[at[ep] for ep, _ in axes.places]]",
    ),
)

PEERS = Said(
    "tests/peer_buffer/test_peer_buffer_order.py",
    Fault(
        "rows that are looked for where a rank's own would be",
        "peer_buffer.py",
        " - (pairs[peer][peer] if peer < me else 0)",
        "",
    ),
    Fault(
        "a slot that is written while another reads it",
        "peer_buffer.py",
        "        for reader in self._others:\n            self._driver.wait_bit(self._flag(self.rank, _READ,",
        "        for reader in ():\n            self._driver.wait_bit(self._flag(self.rank, _READ,",
    ),
    Fault(
        "what comes in the order of those that it is fetched from",
        "peer_buffer.py",
        "to = out.data_ptr() + row * sum(of[me] for of in pairs[:peer])",
        "to = out.data_ptr() + row * sum(pairs[p][me] for p in self._others[: self._others.index(peer)])",
    ),
    Fault(
        "the way back with the sizes of the way there",
        "world.py",
        "list(zip(*self.pairs, strict=True))",
        "self.pairs",
    ),
    Fault(
        "a rank's own rows from the beginning of their order",
        "peer_buffer.py",
        "order[before : before + own], out=out",
        "order[:own], out=out",
    ),
    Fault(
        "a replayed round that begins in the phase where the last one ended",
        "peer_buffer.py",
        "while self._number % (_PHASES * SLOTS):",
        "while self._number % SLOTS:",
    ),
    Fault(
        "messages that go on counting after some that were given up",
        "peer_buffer.py",
        "self._number, self._free = 0, [None] * SLOTS",
        "self._free = [None] * SLOTS",
    ),
)

PEERS_LAYOUTS = Said(
    "tests/peer_buffer/test_peer_buffer_layouts.py",
    Fault(
        "the counts of what other ranks get taken for one's own",
        "experts/plan.py",
        "mine = every[:, exchange.rank]",
        "mine = every[exchange.rank]",
    ),
)

PEERS_MEMORY = Said(
    "tests/peer_buffer/test_peer_memory_order.py",
    Fault(
        "gradients written over that others still read",
        "peer_memory.py",
        "if region is not None and region.last:",
        "if False:",
    ),
    Fault(
        "a sum in which a rank's own part is another's",
        "peer_memory.py",
        "own = x[self.rank * out.numel() : (self.rank + 1) * out.numel()]",
        "own = x[: out.numel()]",
    ),
)

BESIDE = Said(
    "tests/experts/test_experts_streams.py",
    Fault(
        "rows of a cut expert, or beside dropped ones, that leave before it is known where their tokens are",
        "experts/plan.py",
        "            with self.beside.used():  # where",
        "            if True:  # where",
    ),
    Fault(
        "outputs that are added up before they came",
        "experts/dispatch.py",
        "self._own.pop(message), self.taken(message) if",
        "self._own.pop(message), self._under_way.pop(message).tensor if",
    ),
)
