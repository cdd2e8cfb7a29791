"""The package `megatron-fsdp` (written against 0.6.1) around the plain PyTorch model; it must be installed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.train.peers import RunRejectedError, torch_peer
from benchmarks.train.peers.torch_masters import local_of
from benchmarks.train.peers.torch_model import Block, Model
from benchmarks.train.shapes import Job
from stretto.world import World


class Peer(torch_peer.Peer):
    """fp32 masters and gradients, weights of the run's dtype gathered for each block, AdamW of torch, fused."""

    def __init__(self, variant: str = "") -> None:
        super().__init__("fsdp")
        assert not variant

    def setup(self, job: Job, world: World | None = None) -> None:
        if job.device != "cuda":
            raise RunRejectedError("megatron-fsdp is measured on GPUs alone")
        super().setup(job, world)

    def _compile(self, model: Model) -> None:
        """The forward alone: the compiler would trace the package's hooks, which are the module's."""
        if self.job.compile:
            for block in model.blocks.values():
                block.forward = torch.compile(block.forward)  # type: ignore[method-assign]

    def _fsdp(self, model: Model) -> nn.Module:
        from megatron_fsdp import MixedPrecisionPolicy, fully_shard_model

        self._compile(model)
        policy = MixedPrecisionPolicy(main_params_dtype=torch.float32, main_grads_dtype=torch.float32)
        whole: nn.Module = fully_shard_model(
            model.to(self.dtype),
            device_mesh=init_device_mesh(self.job.device, (self.job.nproc, 1), mesh_dim_names=("dp", "tp")),
            dp_shard_dim="dp",
            tp_dim="tp",
            fsdp_unit_modules=[Block],
            device=self.world.device,
            mixed_precision_policy=policy,
            calculate_per_token_loss=True,  # losses are by the tokens of the global batch: sum, do not average
            sync_model_each_microbatch=False,
            preproc_state_dict_for_dcp_ckpt=False,
        )
        return whole

    def _adam_on(self, model: nn.Module) -> None:
        """It makes the optimizer's state by a step, which is to leave no trace: without a rate, and not counted."""
        from megatron_fsdp import fully_shard_optimizer

        super()._adam_on(model)
        assert self.adam is not None
        for group in self.adam.param_groups:
            group["lr"] = 0.0
        fully_shard_optimizer(self.adam, preproc_state_dict_for_dcp_ckpt=False)
        for group in self.adam.param_groups:
            group["lr"] = self.job.lr
        for state in self.adam.state.values():
            state["step"].zero_()

    def _accumulated(self) -> Tensor:
        batches = self.rows.next()
        whole: Any = self.model
        total = torch.zeros((), device=self.world.device)
        for n, batch in enumerate(batches):
            tokens, labels = (t.to(self.world.device, non_blocking=True) for t in (batch.tokens, batch.labels))
            whole.is_last_microbatch = n == len(batches) - 1
            loss = self.loss(whole(tokens), labels, float(self.job.shape.tokens))
            loss.backward()
            total += loss.detach()
        return total

    def _update(self) -> None:
        assert self.adam is not None
        whole: Any = self.model
        whole.finish_grad_sync()
        self._clip()
        self.adam.step(sync_grad_before_optimizer_step=False)  # type: ignore[call-arg]
        self.adam.zero_grad()

    def _clip(self) -> None:
        """To a norm of 1. Of a parameter whose shard here is empty there is no gradient, so that torch's own function
        would wait on one rank for a collective of which the other knows nothing."""
        shards = [local_of(p.grad) for p in self.model.parameters() if p.grad is not None]
        square = torch.nn.utils.get_total_norm(shards, foreach=True).square()
        dist.all_reduce(square)
        torch._foreach_mul_(shards, (1.0 / (square.sqrt() + 1e-6)).clamp(max=1.0))

    def about(self) -> dict[str, Any]:
        import megatron_fsdp

        return super().about() | {"megatron-fsdp": megatron_fsdp.__version__}
