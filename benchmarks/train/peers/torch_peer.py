"""Plain PyTorch, as well as it can be written with what torch has: the mark that Stretto is held against.

SDPA with cuDNN first, torch.compile on each block and on the loss, fused AdamW on fp32 masters, gradients added up in
fp32. Over several devices: DDP or ZeRO-1 or `fully_shard` (dp), `parallelize_module` with sequence parallelism and
parallel loss (tp; also with torch's asynchronous collectives), `torch.distributed.pipelining` with 1F1B or, with two
stages a rank, interleaved (pp).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from benchmarks.train.data import Rows
from benchmarks.train.peers import RunRejectedError, peak_of
from benchmarks.train.peers.torch_async_tp import Fusions, use_symmetric_memory
from benchmarks.train.peers.torch_masters import Masters, local_of
from benchmarks.train.peers.torch_model import Block, Model, fill, loss_of
from benchmarks.train.shapes import Job
from stretto.initialize import initialize
from stretto.world import World

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

WAYS = {"zero1": "dp", "fsdp": "dp", "async-tp": "tp", "interleaved": "pp"}
"""Under dp "" is DDP, under pp 1F1B."""


class Peer:
    """See `benchmarks.train.peers.Peer`. Variants: "eager"; of one way to use several devices, those of `WAYS`."""

    def __init__(self, variant: str = "") -> None:
        self.variant = variant
        self._stack = ExitStack()

    def setup(self, job: Job, world: World | None = None) -> None:
        """In `world`, or in that of the launch environment."""
        if job.parallel != (needs := WAYS.get(self.variant, job.parallel)):
            raise RunRejectedError(f"torch-{self.variant} is a way to use several devices as {needs}")
        if self.variant == "async-tp" and not job.compile:
            raise RunRejectedError("torch-async-tp is done by torch's compiler: without it, it is torch-eager")
        if self.variant == "eager":
            job = replace(job, compile=False)
        self.job, self.dtype = job, DTYPES[job.dtype]
        world = world or self._stack.enter_context(initialize(device=job.device))
        self.world, self.mesh = world, None
        if job.nproc > 1:
            self.mesh = init_device_mesh(job.device, (job.nproc,), mesh_dim_names=(job.parallel,))
        self.fusions: Fusions | None = None
        if self.variant == "async-tp":
            assert self.mesh is not None
            use_symmetric_memory(self.mesh.get_group().group_name, world.device)
            self.fusions = Fusions()
        self.rows = Rows(job, world.rank if job.parallel == "dp" else 0)
        self.expand = job.device == "cuda" and not _cudnn_groups(world.device)
        # In eager mode, or over logits that are cut, there is nothing to compile.
        self.loss = torch.compile(loss_of) if job.compile and job.parallel != "tp" else loss_of
        self.masters: Masters | None = None
        self.adam: torch.optim.AdamW | None = None
        models = self._models()
        model = cast("Model", models[0])
        if job.parallel == "dp" and self.variant != "zero1":
            self.model = self._fsdp(model) if self.variant == "fsdp" else self._ddp(model)
            self._adam_on(self.model)
        else:
            if self.mesh is not None and job.parallel == "tp":
                _cut(model, self.mesh)
            self.model = model
            group = None if self.mesh is None else self.mesh.get_group()
            zero, spread = (group, None) if job.parallel == "dp" else (None, group)
            self.masters = Masters(models, dtype=self.dtype, lr=job.lr, zero=zero, spread=spread)
            for each in models:
                self._compile(cast("Model", each))
        if job.parallel == "pp":
            self._pipeline(models)

    def _models(self) -> nn.ModuleList:
        """The whole model, or this rank's stages."""
        pp, layers = self.job.size("pp"), range(self.job.shape.layers)
        each = len(layers) // (pp * (chunks := 2 if self.variant == "interleaved" else 1))
        stages = [self.world.rank + n * pp for n in range(chunks)] if pp > 1 else [0]
        return nn.ModuleList(self._model(layers[s * each : (s + 1) * each]) for s in stages)

    def _model(self, layers: range) -> Model:
        """fp32, initialized."""
        shape = self.job.shape
        with torch.device(self.world.device):
            packed = self.job.parallel != "tp"
            model = Model(shape, layers, packed=packed, expand=self.expand, dtype=self.dtype)
        fill(model, shape, self.job.seed)
        return model

    def _compile(self, model: Model) -> None:
        if self.job.compile:
            for block in model.blocks.values():
                # A break of the graph at a collective of tp would hide it from the compiler.
                block.compile(fullgraph=self.job.parallel == "tp", options=self.fusions and self.fusions.options)

    def _ddp(self, model: Model) -> nn.Module:
        """fp32 weights, autocast to bf16: so DDP adds up and reduces in fp32."""
        self._compile(model)
        device_ids = [self.world.device] if self.job.device == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    def _fsdp(self, model: Model) -> nn.Module:
        """fp32 shards; bf16 copies are gathered for each block and dropped after it."""
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._compile(model)
        for block in model.blocks.values():
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        whole: nn.Module = fully_shard(model, mesh=self.mesh, mp_policy=policy)
        assert isinstance(whole, FSDPModule)
        for module in whole.modules():
            if isinstance(module, FSDPModule):  # losses are by the tokens of the global batch: sum, do not average
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return whole

    def _adam_on(self, model: nn.Module) -> None:
        params = list(model.parameters())
        groups = [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=self.job.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def _pipeline(self, models: nn.ModuleList) -> None:
        count, world = float(self.job.shape.tokens), self.world
        stages = [
            PipelineStage(model, world.rank + n * world.size, len(models) * world.size, world.device)
            for n, model in enumerate(models)
        ]
        microbatches = self.job.shape.microbatches(1)

        def loss(y: Tensor, labels: Tensor) -> Tensor:
            return cast("Tensor", self.loss(y, labels, count))

        self.schedule: Schedule1F1B | ScheduleInterleaved1F1B
        if len(stages) > 1:
            self.schedule = ScheduleInterleaved1F1B(stages, microbatches, loss_fn=loss, scale_grads=False)
        else:
            self.schedule = Schedule1F1B(stages[0], microbatches, loss_fn=loss, scale_grads=False)

    def step(self) -> Tensor:
        with sdpa_kernel(BACKENDS, set_priority=True) if self.job.device == "cuda" else nullcontext():
            loss = self._pipelined() if self.job.parallel == "pp" else self._accumulated()
            self._update()
        return loss

    def _pipelined(self) -> Tensor:
        assert self.masters is not None
        for bucket in self.masters.buckets:
            bucket.grads.zero_()
        self.masters.begin(first=False, last=True)
        batches = self.rows.next()
        losses: list[Tensor] = []
        first, last = self.world.rank == 0, self.world.rank == self.world.size - 1
        device = self.world.device
        tokens = (torch.cat([b.tokens for b in batches]).to(device, non_blocking=True),) if first else ()
        labels = torch.cat([b.labels for b in batches]).to(device, non_blocking=True) if last else None
        self.schedule.step(*tokens, target=labels, losses=losses if last else None, return_outputs=False)
        return torch.stack([x.detach() for x in losses]).sum() if last else torch.zeros((), device=device)

    def _accumulated(self) -> Tensor:
        total = torch.zeros((), device=self.world.device)
        batches = self.rows.next()
        for n, batch in enumerate(batches):
            tokens, labels = (t.to(self.world.device, non_blocking=True) for t in (batch.tokens, batch.labels))
            if self.masters is not None:
                self.masters.begin(first=n == 0, last=n == len(batches) - 1)
            with self._around(last=n == len(batches) - 1):
                if self.job.parallel == "tp":
                    logits = self.model(tokens.flatten())
                    loss = F.cross_entropy(logits.float(), labels.flatten(), reduction="sum")
                    del logits
                    loss = loss / self.job.shape.tokens
                else:
                    with self._autocast():
                        logits = self.model(tokens)
                    loss = self.loss(logits, labels, float(self.job.shape.tokens))
                    del logits
                loss.backward()
            total += local_of(loss.detach())
        return total / self.job.size("tp")  # every tp rank has the whole one

    def _autocast(self) -> AbstractContextManager[object]:
        if isinstance(self.model, DistributedDataParallel) and self.dtype != torch.float32:
            return torch.autocast(self.job.device, self.dtype)
        return nullcontext()

    def _around(self, *, last: bool) -> AbstractContextManager[object]:
        """DDP reduces in the last backward of a step alone; the loss of a cut head needs its own rules."""
        if self.job.parallel == "tp":
            return loss_parallel()
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _update(self) -> None:
        if self.masters is not None:
            self.masters.step()
            return
        assert self.adam is not None
        if isinstance(self.model, DistributedDataParallel):  # DDP averages, the loss wants the sum
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], self.world.size)
        torch.nn.utils.clip_grad_norm_(list(self.model.parameters()), 1.0, foreach=True)
        self.adam.step()
        self.adam.zero_grad(set_to_none=not isinstance(self.model, DistributedDataParallel))

    def held(self) -> dict[str, list[Tensor]]:
        if self.masters is not None:
            return self.masters.held()
        assert self.adam is not None
        params = list(self.model.parameters())
        state = [t for per in self.adam.state.values() for t in per.values() if isinstance(t, Tensor)]
        masters = [p.detach() for p in params]
        return {
            "weights": [],
            "gradients": [local_of(p.grad) for p in params if p.grad is not None],
            "optimizer": [local_of(t) for t in (*state, *masters)],
        }

    def about(self) -> dict[str, Any]:
        about = {"attention": "cuDNN" + (", keys repeated" if self.expand else ""), "compiled": self.job.compile}
        return about if self.fusions is None else about | {"found by the compiler": self.fusions.about()}

    @property
    def peak_bytes(self) -> int:
        return peak_of(self.job.device)

    def close(self) -> None:
        self._stack.close()


def _cut(model: Model, mesh: DeviceMesh) -> None:
    """Tensor and sequence parallel, as torch's tutorial has it, over rows of tokens."""
    assert model.embed is not None
    rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0))
    head = ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"embed": rows, "norm": SequenceParallel(sequence_dim=0), "head": head})
    for block in model.blocks.values():
        assert isinstance(block, Block)
        gather = (Shard(0), None, None), (Replicate(), None, None)
        plan: dict[str, Any] = {
            "norm1": SequenceParallel(sequence_dim=0),
            "norm2": SequenceParallel(sequence_dim=0),
            "attention": PrepareModuleInput(input_layouts=gather[0], desired_input_layouts=gather[1]),
            "mlp": PrepareModuleInput(input_layouts=(Shard(0),), desired_input_layouts=(Replicate(),)),
            "attention.o": RowwiseParallel(output_layouts=Shard(0)),
            "mlp.down": RowwiseParallel(output_layouts=Shard(0)),
        }
        columns = [f"attention.{n}" for n in "qkv"] + ["mlp.up", *(["mlp.gate"] if block.mlp.gated else [])]
        parallelize_module(block, mesh, plan | {name: ColwiseParallel() for name in columns})


def _cudnn_groups(device: torch.device) -> bool:
    """Whether cuDNN's attention takes fewer keys than queries."""
    q, k, v = (torch.randn(1, heads, 256, 128, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2))
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    except RuntimeError:
        return False
    return True
