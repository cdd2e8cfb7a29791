"""As `verify_said`: model families, their files in and out, and samples that keep their past."""

from __future__ import annotations

from verify_fault import Fault, Said

FAMILIES = Said(
    "tests/interop/test_interop_families.py",
    Fault(
        "a rotated share of a head that is its end",
        "models/rope.py",
        "heads = x[:, :, :rotated, : cos.shape[-1]]",
        "heads = x[:, :, :rotated, x.shape[-1] - cos.shape[-1] :]",
    ),
    Fault(
        "a stretch of wavelengths left out",
        "models/frequencies.py",
        "return frequency * (kept + (1 - kept) / c.rope_factor), 1.0",
        "return frequency, 1.0",
    ),
    Fault(
        "windows one position too wide",
        "attention/dot_product.py",
        "(behind < (window or s))",
        "(behind <= (window or s))",
    ),
    Fault(
        "a norm that multiplies by its weight where it is 1 + weight",
        "tensor_parallel/formulas.py",
        "return rms_norm(x, 1 + widened(weight), eps)",
        "return rms_norm(x, widened(weight), eps)",
    ),
    Fault(
        "a norm after a sublayer left out",
        "models/block.py",
        "return added if norm is None else norm.now(added)",
        "return added",
    ),
    Fault(
        "a softcap whose gradient is left out",
        "tensor_parallel/loss_formulas.py",
        "dy.unsqueeze(-1) * (1 - bent.square())",
        "dy.unsqueeze(-1)",
    ),
    Fault(
        "norms over all heads that do not sum over ranks",
        "models/full_norm.py",
        "        all_reduce_(means, build.tp).wait()\n",
        "",
    ),
    Fault(
        "gradients of norms over all heads that do not sum over ranks",
        "models/full_norm.py",
        "        all_reduce_(p, ctx.build.tp).wait()\n",
        "",
    ),
    Fault(
        "latents whose gradient is that of one rank's heads",
        "models/latent.py",
        "low = enter(self.latent_proj(x), b.tp, sequence_parallel=b.sequence_parallel, overlap_with=b.overlap_with)",
        "low = self.latent_proj(x)",
    ),
    Fault(
        "a scale of attention that YaRN does not stretch",
        "arguments/model.py",
        "if scale is None else scale) * share * share",
        "if scale is None else scale)",
    ),
    Fault(
        "a bias that each rank of a cut expert adds",
        "experts/grouped.py",
        "self.adds = column or build.experts.etp.rank == 0",
        "self.adds = True",
    ),
    Fault(
        "a clamp whose gradient goes on beyond it",
        "tensor_parallel/formulas.py",
        "within = (gate <= limit, up.abs() <= limit)",
        "within = (gate <= gate, up.abs() <= limit)",
    ),
    Fault(
        "values that bounds of queries and keys leave out",
        "models/attention.py",
        "q, k, v = self._clipped(q), self._clipped(k), self._clipped(v)",
        "q, k = self._clipped(q), self._clipped(k)",
    ),
)

CONFIG = Said(
    "tests/interop/test_interop_config.py",
    Fault(
        "a field that nobody reads passed over",
        "interop/config.py",
        'self.wrong.append(f"{name!r:.60} = {value!r:.60}: unknown")',
        "pass",
    ),
    Fault(
        "a number beyond every model's taken",
        "interop/config.py",
        "not least <= value <= most:",
        "not least <= value:",
    ),
    Fault(
        "a window of a family that switches it off",
        "interop/windows.py",
        "size = size if used is True else None",
        "pass",
    ),
    Fault(
        "a stretch of the local wavelengths of Gemma 3",
        "interop/rope.py",
        '    return whole, {"rope_theta": local}, "rope_scaling"',
        '    return whole, {**whole, "rope_theta": local}, "rope_scaling"',
    ),
    Fault(
        "a setting of a family that one of its models does not use",
        "interop/config.py",
        "with_effect(ModelConfig(**values))",
        "ModelConfig(**values)",
    ),
    Fault(
        "layers that a file names dense, written as each n-th",
        "interop/write.py",
        "[n for n in _dense(model) if n < model.layers and (n + 1) % model.sparse_every == 0]",
        "[]",
    ),
)

FILES = Said(
    "tests/interop/test_interop_files.py",
    Fault(
        "a piece of a stack read from where another lies",
        "interop/names.py",
        "group * stride + self.start + within",
        "group * stride + within",
    ),
    Fault(
        "a transposed matrix read as it is",
        "interop/load.py",
        "dims, rows = dims[::-1], rows.t()",
        "pass",
    ),
    Fault(
        "a tensor of the directory that nobody reads",
        "interop/load.py",
        "left = sorted(there - {*names.values()})",
        "left = sorted(there - there)",
    ),
    Fault(
        "a target that nobody fills",
        "interop/load.py",
        'wrong.append(f"{held.name} {list(held.shape)}: missing")',
        "pass",
    ),
    Fault(
        "an index that leads out of its directory",
        "interop/files.py",
        "Path(file).name != file or ",
        "",
    ),
)

IN_AND_OUT = Said(
    "tests/cli/test_cli_huggingface.py",
    Fault(
        "weights of the directory that are drawn anew instead",
        "train/huggingface.py",
        '    load_weights(directory, config, shapes, base, built.stepper.state.axis("tp", "cp", "dp", "pp"))\n',
        "",
    ),
    Fault(
        "an export that does not read the checkpoint",
        "cli/export.py",
        "        read_pieces(self.path, reads(self.contents, slices))\n",
        "",
    ),
    Fault(
        "a setting that contradicts the model taken",
        "arguments/resolve.py",
        "_is_shape(path) and said != there",
        "False",
    ),
)

CACHE = Said(
    "tests/models/test_models_cache.py",
    Fault(
        "new tokens at positions counted from 0",
        "models/transformer.py",
        "found.at(structure)",
        "found.at(Structure.of_tokens(like.shape[0]))",
    ),
    Fault(
        "a window that is counted from the new tokens",
        "attention/dot_product.py",
        "behind = at[s - n :, None] - at",
        "behind = at[:n, None] - at",
    ),
    Fault(
        "queries that see what comes after them",
        "attention/dot_product.py",
        "return (behind >= 0) & (behind < (window or s))",
        "return behind < (window or s)",
    ),
)
