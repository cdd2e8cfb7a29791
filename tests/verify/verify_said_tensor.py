"""As `verify_said`: existing modules that are cut in place, what a block computes once more, layers of all shapes."""

from __future__ import annotations

from verify_fault import Fault, Said

FOREIGN = Said(
    "tests/interop/test_interop_parallelize.py",
    Fault(
        "key/value heads in copies whose parts of the gradient are not summed",
        "tensor_parallel/foreign.py",
        "partial = (axis.name,) if copies > 1 else ()",
        "partial = ()",
    ),
    Fault(
        "a rank that reads too many heads",
        "interop/plans.py",
        "heads // axis.size if axis.size > kv else heads // kv",
        "heads // kv",
    ),
    Fault(
        "norms of a head whose parts are not summed",
        "interop/plans.py",
        '"*.self_attn.[qk]_norm": Replicated(partial=True)',
        '"*.self_attn.[qk]_norm": Replicated()',
    ),
    Fault(
        "norms on a part of the sequence whose parts are not summed",
        "interop/plans.py",
        '**_feed_forward(borders),\n        "*norm": Replicated(partial=borders.sequence),',
        '**_feed_forward(borders),\n        "*norm": Replicated(),',
    ),
    Fault(
        "logits whose gradient every rank adds",
        "tensor_parallel/foreign_layers.py",
        "return dy.chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank], None, None",
        "return ctx.axis.size * dy.chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank], None, None",
    ),
    Fault(
        "a bias added on every rank",
        "tensor_parallel/foreign_layers.py",
        "y = _left(F.linear(x, weight), over)\n    return y if bias is None",
        "y = _left(F.linear(x, weight, bias), over)\n    return y if True",
    ),
    Fault(
        "values of another rank's random draw",
        "tensor_parallel/foreign.py",
        "first = broadcast(whole, axis)",
        "first = whole",
    ),
)

PLANS = Said(
    "tests/interop/test_interop_plans.py",
    Fault("queries, keys and values cut as one", "interop/plans.py", "sections=(width,) * 3", "sections=()"),
    Fault(
        "a rank that splits them as if it had all",
        "interop/plans.py",
        '"split_size": width // axis.size',
        '"split_size": width',
    ),
    Fault(
        "experts whose inputs lack other ranks' share of the gradient",
        "tensor_parallel/foreign_layers.py",
        "return copy_to(x, over.axis), experts,",
        "return x, experts,",
    ),
    Fault(
        "weights of experts that lack it",
        "tensor_parallel/foreign_layers.py",
        "experts, copy_to(weights, over.axis)",
        "experts, weights",
    ),
    Fault(
        "a sequence that is gathered and counted by every rank",
        "tensor_parallel/foreign_layers.py",
        'if takes == "and gives":\n',
        "if False:\n",
    ),
    Fault(
        "embeddings that are not scaled",
        "tensor_parallel/foreign_layers.py",
        "return super().forward(input) * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)",
        "return super().forward(input)",
    ),
    Fault(
        "a norm whose output is not gathered",
        "tensor_parallel/foreign_layers.py",
        "    elif style.gathers:\n",
        "    elif False:\n",
    ),
    Fault(
        "the columns of a stack written as one",
        "params/spec.py",
        "if cut.sections:\n                dim",
        "if False:\n                dim",
    ),
    Fault(
        "features of padding that count",
        "tensor_parallel/foreign_layers.py",
        "    if features < weight.shape[1]:",
        "    if False:",
    ),
)

RECOMPUTE = Said(
    "tests/models/test_models_recompute.py",
    Fault(
        "a part that is kept although it is computed once more",
        "models/attention.py",
        '        elif "attention" in again:\n            q, k, v',
        "        elif not self:\n            q, k, v",
    ),
    Fault("a ledger that forgets LSEs", "estimate/kept.py", "(attended + lse) * first,", "attended * first,"),
    Fault(
        "sinks without a gradient where attention is computed once more",
        "models/attention.py",
        "q, k, v, *sinks), structure)",
        "q, k, v, *(x.detach() for x in sinks)), structure)",
    ),
    Fault(
        "a budget that is exceeded",
        "estimate/recompute.py",
        "if needed() <= budget:\n            break\n        chosen[place] = hulls",
        "if needed() <= 1.2 * budget:\n            break\n        chosen[place] = hulls",
    ),
    Fault(
        "layers recomputed that need not be",
        "estimate/recompute.py",
        "if chosen[place].seconds >= reached.seconds:",
        "if True:",
    ),
)

SHAPES = Said(
    "tests/tensor_parallel/test_tensor_parallel_shapes.py",
    Fault(
        "an input that is taken for contiguous",
        "tensor_parallel/linear.py",
        "return x.reshape(-1, x.shape[-1])",
        "return x.as_strided((x.numel() // x.shape[-1], x.shape[-1]), (x.shape[-1], 1))",
    ),
    Fault(
        "a frozen weight that gets a gradient",
        "tensor_parallel/linear.py",
        "    if not weight.requires_grad:\n        return None\n",
        "",
    ),
    Fault("a width whose rest is left out", "params/spec.py", "chunk = -(-size // parts)", "chunk = size // parts"),
    Fault(
        "a weight used twice whose second gradient is lost",
        "tensor_parallel/linear.py",
        "torch.mm(left, x, out=total) if first_microbatch else total.addmm_(left, x)",
        "torch.mm(left, x, out=total)",
    ),
)
