"""Spike: would typed local tensors prove our gradients right without a cluster?

    pip install spmd-types==0.3.1       # for this experiment alone
    python -m benchmarks.spike_types

One forward and backward of the model on one process, as rank 0 of tp=2 on groups that pretend, under the checker of
spmd-types: once for each kind of model, then once for each fault. A type says of a tensor and an axis whether the ranks
hold the same and will get the same gradient (I), the same and a part of the gradient (R), different parts (V), or terms
of a sum (P). `ParamSpec` says it of every parameter. docs/spikes.md has what came out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import spmd_types as spmd  # type: ignore[import-not-found]
import spmd_types.checker  # type: ignore[import-not-found]
import torch
from spmd_types import I, MeshAxis, P, R, S, V, rules
from torch import Tensor
from torch.nn import functional as F

from stretto import collectives
from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig
from stretto.batch import Batch
from stretto.layout import Layout
from stretto.models import Microbatch
from stretto.parallel_state import ParallelState
from stretto.params import ParamSpec, Shard, collect
from stretto.tensor_parallel import layers, mappings, vocab
from stretto.train.build import build

TP = MeshAxis.of(2, 1)


def _copy_to(*, x: Any) -> Any:
    return rules.convert(x, TP, src=I, dst=R)


def _reduce_from(*, x: Any) -> Any:
    return rules.all_reduce(x, TP, src=V, dst=I)


def _all_gather(*, x: Any) -> Any:
    return rules.all_gather(x, TP, src=S(0), dst=R)


def _reduce_scatter(*, x: Any) -> Any:
    return rules.reduce_scatter(rules.reinterpret(x, TP, src=V, dst=P), TP, src=P, dst=S(0))


def _cross_entropy(outputs: Tensor, *, logits: Tensor, labels: Tensor) -> None:
    for x, kind in ((logits, V), (labels, R), (outputs, I)):
        spmd.assert_type(x, {TP: kind})


RULES: dict[type, Callable[..., Any]] = {
    mappings._CopyTo: _copy_to,
    mappings._ReduceFrom: _reduce_from,
    collectives._AllGather: _all_gather,
    collectives._ReduceScatter: _reduce_scatter,
    vocab._CrossEntropy: _cross_entropy,
}


def type_of(spec: ParamSpec) -> Any:
    """What a spec says of a parameter along tp."""
    if any(cut.axis == "tp" for cut in spec.shard):
        return V
    return R if "tp" in spec.sum_grad else I


@contextmanager
def checker() -> Iterator[None]:
    """Within, every operation is typed or refused."""
    for function, rule in RULES.items():
        function.spmd_typecheck = staticmethod(rule)  # type: ignore[attr-defined]
        spmd.register_autograd_function(function)
    with spmd.set_current_mesh({"tp": TP}), spmd.checker.typecheck(local=True):
        yield


def check(model: ModelConfig, *, sequence_parallel: bool = False) -> None:
    """One typed forward and backward. Raises what the checker raises."""
    args = Arguments(
        model,
        ParallelConfig(tp=2, dp=1, sequence_parallel=sequence_parallel),
        batch=BatchConfig(seq_len=8, micro_batch=2, global_batch=2),
    )
    with ParallelState.inspect(Layout.of(tp=2), rank=0) as state:
        built = build(args, state)
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        batch, count = Batch(tokens, tokens.clone(), torch.ones(2, 8, dtype=torch.bool)), torch.tensor(16.0)
        with checker():
            for item in collect(built.stages[0]):
                spmd.assert_type(item.param, {TP: type_of(item.logical[0].spec)})
            for x, kind in ((batch.tokens, R), (batch.labels, R), (batch.loss_mask, I), (count, I)):
                spmd.assert_type(x, {TP: kind})
            loss = built.stages[0](None, Microbatch(batch, count))
            spmd.assert_type(loss, {TP: I})
            loss.backward()


def small(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "ffn": 16, "vocab": 37, **settings})


Patch = Callable[[], AbstractContextManager[Any]]


def in_place_of(owner: Any, name: str, new: Any) -> Patch:
    return lambda: mock.patch.object(owner, name, new)


def _bias_too_early(self: layers.RowParallelLinear, x: Tensor) -> Tensor:
    y = F.linear(x, self.weight, self.bias)
    return mappings.leave(y, self.tp, sequence_parallel=self.sequence_parallel)


def _never_left(self: layers.RowParallelLinear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def _never_entered(self: layers.ColumnParallelLinear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def _not_masked(self: vocab.VocabParallelEmbedding, tokens: Tensor) -> Tensor:
    local, _ = vocab._localise(tokens.t(), self.start, self.rows)
    return mappings.leave(F.embedding(local, self.weight), self.tp, sequence_parallel=self.sequence_parallel)


def _copies_not_summed(part: Any, shape: Any, init: Any, *, weight_decay: bool) -> ParamSpec:
    shard = (Shard("tp", 0, copies=part.copies),)
    return ParamSpec(shape, init, shard=shard, weight_decay=weight_decay, part=part.name)


def _whole(shape: Any, init: Any, *, sequence_parallel: bool, weight_decay: bool = False) -> ParamSpec:
    del sequence_parallel
    return ParamSpec(shape, init, weight_decay=weight_decay)


def _identity(_: Any, dy: Tensor) -> tuple[Tensor, None]:
    return dy, None


def _sum_again(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return mappings.reduce_from(dy, ctx.tp), None


ROW, COLUMN = layers.RowParallelLinear, layers.ColumnParallelLinear
CASES: list[tuple[str, Patch, dict[str, Any], bool]] = [
    ("right: Llama", nullcontext, {}, False),
    ("right: Llama, sequence parallel", nullcontext, {}, True),
    ("right: GPT-2", nullcontext, {"bias": True, "norm": "layer", "position": "learned", "activation": "gelu"}, False),
    ("right: tied, one kv head, qk-norm", nullcontext, {"tied": True, "kv_heads": 1, "qk_norm": True}, True),
    ("row: no sum on the way out", in_place_of(ROW, "forward", _never_left), {}, False),
    ("row: bias before the sum", in_place_of(ROW, "forward", _bias_too_early), {"bias": True}, False),
    ("column: no sum on the way back", in_place_of(COLUMN, "forward", _never_entered), {}, False),
    ("norms declared without their sum", in_place_of(layers, "replicated", _whole), {}, True),
    ("row: bias before the scattered sum", in_place_of(ROW, "forward", _bias_too_early), {"bias": True}, True),
    ("shared kv heads without their sum", in_place_of(layers, "_cut_rows", _copies_not_summed), {"kv_heads": 1}, False),
    (
        "embedding: foreign rows not masked",
        in_place_of(vocab.VocabParallelEmbedding, "forward", _not_masked),
        {},
        False,
    ),
    ("copy_to: backward does not sum", in_place_of(mappings._CopyTo, "backward", staticmethod(_identity)), {}, False),
    ("reduce_from: backward sums", in_place_of(mappings._ReduceFrom, "backward", staticmethod(_sum_again)), {}, False),
]


def main() -> None:
    for name, patch, settings, sequence_parallel in CASES:
        begin = time.perf_counter()
        with patch():
            try:
                check(small(**settings), sequence_parallel=sequence_parallel)
                said = "no objection"
            except spmd.SpmdTypeError as error:
                said = str(error).splitlines()[0]
        print(f"{name:<36} {time.perf_counter() - begin:5.2f} s  {said}")


if __name__ == "__main__":
    main()
