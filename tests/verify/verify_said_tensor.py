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
        'own = Replicated(partial=border == "sequence")',
        "own = Replicated()",
    ),
    Fault(
        "logits whose gradient every rank adds",
        "tensor_parallel/foreign_layers.py",
        "return dy.chunk(ctx.axis.size, -1)[ctx.axis.rank], None",
        "return ctx.axis.size * dy.chunk(ctx.axis.size, -1)[ctx.axis.rank], None",
    ),
    Fault(
        "a bias added on every rank",
        "tensor_parallel/foreign_layers.py",
        '_left(F.linear(input, self.weight), over), self._parameters["bias"]',
        "_left(F.linear(input, self.weight, self.bias), over), None",
    ),
    Fault(
        "values of another rank's random draw",
        "tensor_parallel/foreign.py",
        "broadcast(whole, axis)[inside]",
        "whole[inside]",
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
