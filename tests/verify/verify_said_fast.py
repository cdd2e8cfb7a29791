"""As `verify_said`: the model's own equations, and what makes a step fast or small."""

from __future__ import annotations

from verify_fault import Fault, Said

MODEL = Said(
    "tests/models/test_models_transformer.py",
    Fault(
        "rotation of the wrong halves",
        "models/rope.py",
        "torch.cat([-high, low], -1)",
        "torch.cat([high, -low], -1)",
    ),
    Fault(
        "a norm left out",
        "models/block.py",
        "enters = _normed(x, before_attention)",
        "enters = WithResidual(x, x)",
    ),
    Fault(
        "heads grouped in another order",
        "attention/dot_product.py",
        "    if not q.is_cuda:\n",
        "    k, v = (t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v))\n    if not q.is_cuda:\n",
    ),
    Fault(
        "a scale of 1/sqrt(hidden/heads) where head_dim says otherwise",
        "models/attention.py",
        "        y = self.attend(",
        """        q, k, v = self._heads(qkv.view(s, b, -1, self.dim), rotation)
        q = q * (self.dim * self.heads / self.o_proj.weight.shape[0]) ** 0.5
        y = self.attend(""",
    ),
    Fault(
        "the causal mask left out",
        "attention/dot_product.py",
        "is_causal=mask is None, scale=scores.scale, enable_gqa=grouped\n        )\n    # As",
        "is_causal=False, scale=scores.scale, enable_gqa=grouped\n        )\n    # As",
    ),
    Fault(
        "the bias of one matrix ignored",
        "tensor_parallel/layers.py",
        "return y + self.bias if self.shift is None else self.shift.now(y, self.bias)",
        "return y",
    ),
    Fault(
        "the mask of the loss ignored",
        "models/transformer.py",
        "batch.loss_mask.double()",
        "(batch.loss_mask | True).double()",
    ),
    Fault(
        "the gradient of a tied embedding counted once",
        "tensor_parallel/vocab.py",
        "if weight is None else weight\n        terms",
        "if weight is None else weight.detach()\n        terms",
    ),
    Fault(
        "a single pair of a latent rotated where it lies",
        "models/latent.py",
        "config.rope_interleaved and self.rotated > 2",
        "config.rope_interleaved",
    ),
)

POINTWISE = Said(
    "tests/tensor_parallel/test_tensor_parallel_pointwise.py",
    Fault(
        "an adjoint of SwiGLU without the slope of its sigmoid",
        "tensor_parallel/formulas.py",
        "d_gate = d * up * g * (1 + gate * (1 - g))",
        "d_gate = d * up * g",
    ),
    Fault(
        "an adjoint of the other form of GELU",
        "tensor_parallel/formulas.py",
        'gelu_backward(dy, x, approximate="tanh")',
        "gelu_backward(dy, x)",
    ),
    Fault(
        "an adjoint of RMSNorm that takes the mean square for a constant",
        "tensor_parallel/formulas.py",
        "dx = (dn - n * (dn * n).mean(-1, keepdim=True)) * scale",
        "dx = dn * scale",
    ),
    Fault(
        "an adjoint of LayerNorm that takes the mean for a constant",
        "tensor_parallel/formulas.py",
        "(dn - dn.mean(-1, keepdim=True) - n *",
        "(dn - n *",
    ),
    Fault(
        "a gradient of a norm's weight that forgets to normalise",
        "tensor_parallel/formulas.py",
        "_over_rows(d * n).to(weight.dtype)\n",
        "_over_rows(d * wide).to(weight.dtype)\n",
    ),
    Fault(
        "an input that is made again in less precision",
        "tensor_parallel/linear.py",
        "x, *rest = gradients(ctx.made_by.both, dx, dresidual, *inputs)\n",
        "x, *rest = gradients(ctx.made_by.both, dx, dresidual, *inputs)\n        x = x.float().to(x.dtype)\n",
    ),
    Fault(
        "a way past an operation that gives no gradient",
        "tensor_parallel/formulas.py",
        "return dx if dresidual is None else dx + dresidual",
        "return dx",
    ),
    Fault(
        "a bias without gradient where the input is made",
        "tensor_parallel/linear.py",
        "return None, dw, _gemms(build).bias(dy) if ctx.bias else None, *rest",
        "return None, dw, None, *rest",
    ),
    Fault(
        "a weight whose gradient alone is wanted, hidden from autograd",
        "tensor_parallel/linear.py",
        "                if x.requires_grad:\n                    return None",
        "                return None",
    ),
    Fault(
        "a second gradient of a weight that overwrites the first",
        "tensor_parallel/linear.py",
        "torch.mm(left, x, out=total) if first_microbatch else total.addmm_(left, x)",
        "torch.mm(left, x, out=total)",
    ),
    Fault(
        "a first gradient of a step that is added to what is there",
        "tensor_parallel/linear.py",
        "torch.mm(left, x, out=total) if first_microbatch else total.addmm_(left, x)",
        "total.addmm_(left, x)",
    ),
    Fault(
        "narrow products that are added up narrow",
        "tensor_parallel/linear.py",
        "        total.add_(left @ x)\n",
        "        total.copy_(total.to(dy.dtype) + left @ x)\n",
    ),
)

FAST = Said(
    "tests/train/test_train_fast.py",
    Fault(
        "an activation that is made again in less precision",
        "tensor_parallel/linear.py",
        "x = made_by.forward(*inputs)",
        "x = made_by.forward(*(x.float() for x in inputs)).to(gemm.weight.dtype)",
    ),
    Fault(
        "a fused update that is written into a copy",
        "distributed/optimizer.py",
        "update if fuse is None else fuse(update)",
        "update if fuse is None else fuse(lambda master, *rest: update(master.clone(), *rest))",
    ),
    Fault(
        "an update that is compiled anew in later steps",
        "distributed/optimizer.py",
        "                update(*(cut(",
        """                def compiled_in(*given: Any) -> None:
                    plain = [x.item() if isinstance(x, Tensor) and x.dim() == 0 else x for x in given]
                    torch.compile(self.rule.update)(*plain)

                update = update if update is self.rule.update else compiled_in
                update(*(cut(""",
    ),
    Fault(
        "a bucket that does not hear of what has arrived",
        "distributed/bucket.py",
        "self._waiting.discard(param)",
        "pass",
    ),
    Fault(
        "a bucket that leaves with the first of two gradients of a tied embedding",
        "distributed/main_gradients.py",
        "            if added < uses:",
        "            if added < 1:",
    ),
    Fault(
        "a use of a weight that is not announced",
        "tensor_parallel/vocab.py",
        "terms=terms)\n        expect(self.weight, build)\n",
        "terms=terms)\n",
    ),
    Fault(
        "gradients of a weight that are counted on from one backward to the next",
        "distributed/main_gradients.py",
        "self._added.pop(weight, 0)",
        "self._added.get(weight, 0)",
    ),
)

HEAD = Said(
    "tests/tensor_parallel/test_tensor_parallel_head.py",
    Fault(
        "a microbatch whose gradient is lost when two go forward before one goes back",
        "tensor_parallel/cross_entropy.py",
        "of.gemms.add(dw, first_microbatch and part.start == 0, grads, rows)",
        "of.gemms.add(dw, part.start == 0, grads, rows)",
    ),
    Fault(
        "a gradient of the weight that waits for the backward",
        "tensor_parallel/cross_entropy.py",
        "            ctx.save_for_backward(dx)\n",
        "            ctx.save_for_backward(dx, torch.empty_like(weight))\n",
    ),
    Fault(
        "a gradient of a multiple of the loss that is silently wrong",
        "tensor_parallel/cross_entropy.py",
        "torch.where(scale == 1, 1.0, torch.nan)",
        "torch.where(scale == 1, 1.0, scale)",
    ),
)

KERNELS = Said(
    "tests/kernels/test_kernels_hand_written.py",
    Fault(
        "the last rows left out",
        "kernels/rms_norm.py",
        "    for _ in range(turns):\n        here",
        "    for _ in range(turns - 1):\n        here",
    ),
    Fault(
        "the gradient of what goes past lost",
        "kernels/rms_norm.py",
        "out += p.to(tl.float32)",
        "out += 0.0 * p.to(tl.float32)",
    ),
    Fault(
        "an output of attention that is not weighed",
        "kernels/merge.py",
        "z * (q / total)[:, None]",
        "z",
    ),
    Fault(
        "the end of a row that is not a whole block left out",
        "kernels/swiglu.py",
        "inside = at < inner\n",
        "inside = at < inner - inner % block\n",
    ),
    Fault(
        "heads that are not turned turned back",
        "kernels/rope.py",
        "mask=inside & (rotate > 0), other=1.0",
        "mask=inside, other=1.0",
    ),
)

KERNELS_HEAD_NORM = Said(
    "tests/kernels/test_kernels_head_norm.py",
    Fault(
        "keys multiplied by the weights of queries",
        "kernels/head_norm.py",
        "tile, x, steps, k_weight",
        "tile, x, steps, q_weight",
    ),
    Fault(
        "the mean over half of a head",
        "kernels/head_norm.py",
        "squares = tl.sum(low * low + high * high, 1, keep_dims=True)\n    scale",
        "squares = 2 * tl.sum(low * low, 1, keep_dims=True)\n    scale",
    ),
    Fault(
        "angles of another sample",
        "kernels/head_norm.py",
        "cos.stride(1) if cos.shape[1] > 1 else 0",
        "0",
    ),
    Fault(
        "the last tiles left out of a backward",
        "kernels/head_norm.py",
        "tl.range(turns, ",
        "tl.range(turns - 1, ",
    ),
    Fault(
        "gradients of values where those of keys are",
        "kernels/head_norm.py",
        "put(here + heads * 2 * half, halves",
        "put(here, halves",
    ),
    Fault(
        "one weight's gradient as both",
        "kernels/head_norm.py",
        "return dx, dw[:d], dw[d:]",
        "return dx, dw[:d], dw[:d]",
    ),
    Fault(
        "gradients rotated forward",
        "models/head_norm.py",
        "widened(dy), cos, -sin",
        "widened(dy), cos, sin",
    ),
)

KERNELS_FP8 = Said(
    "tests/kernels/test_kernels_fp8.py",
    Fault(
        "the scale of another row",
        "kernels/fp8.py",
        "tl.store(scale + row, unit)",
        "tl.store(scale, unit)",
    ),
    Fault(
        "rows that lie apart read as if they lay together",
        "kernels/fp8.py",
        "number = tl.load(x + row * stride + column,",
        "number = tl.load(x + row * width + column,",
    ),
    Fault(
        "the last column left out",
        "kernels/fp8.py",
        "    inside = column < width\n",
        "    inside = column < width - 1\n",
    ),
    Fault(
        "the last column of bytes left where it was",
        "kernels/fp8.py",
        "    across = (column[:, None] < width) & (row[None, :] < rows)\n    tl.store(transposed",
        "    across = (column[:, None] < width - 1) & (row[None, :] < rows)\n    tl.store(transposed",
    ),
)
