"""megatron-core, with TransformerEngine where it is installed; both must be there beforehand.

bf16 weights, gradients added up and reduced in fp32, Megatron's optimizer with fp32 masters; over dp the optimizer is
sharded and its messages overlap. Written against 0.19.2; without TransformerEngine it is no contender.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from benchmarks.train.data import Rows
from benchmarks.train.peers import RunRejectedError, peak_of
from benchmarks.train.shapes import Job
from stretto.batch import Batch


class Peer:
    """See `benchmarks.train.peers.Peer`. There is one variant."""

    def __init__(self, variant: str = "") -> None:
        self._variant = variant

    def setup(self, job: Job) -> None:
        if job.device != "cuda" or job.dtype != "bf16":
            raise RunRejectedError("megatron-core is measured on GPUs in bf16 alone")
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.module import Float16Module

        self.job, self.engine = job, find_spec("transformer_engine") is not None
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
        parallel_state.initialize_model_parallel(job.size("tp"), job.size("pp"), create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(job.seed)
        self.last = parallel_state.is_pipeline_last_stage()
        several = job.size("dp") > 1
        config = self._config()
        model = Float16Module(config, self._model(config).cuda(torch.cuda.current_device()))
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=several,
            overlap_param_gather=several,
            use_distributed_optimizer=several,
        )
        self.model = DistributedDataParallel(config, ddp, model)
        config.finalize_model_grads_func = finalize_model_grads
        if several:
            config.no_sync_func = self.model.no_sync
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=job.lr,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            bf16=True,
            params_dtype=torch.bfloat16,
            clip_grad=1.0,
            use_distributed_optimizer=several,
            overlap_param_gather=several,
        )
        self.optimizer = get_megatron_optimizer(optimizer, [self.model], use_gloo_process_groups=False)
        self.run = get_forward_backward_func()
        self.rows = Rows(job, dist.get_rank() if several else 0)
        self.positions = torch.arange(job.shape.seq_len, device="cuda").expand(job.shape.micro_batch, -1)

    def _config(self) -> Any:
        from megatron.core.transformer import TransformerConfig

        shape, size = self.job.shape, self.job.size
        return TransformerConfig(
            num_layers=shape.layers,
            hidden_size=shape.hidden,
            num_attention_heads=shape.heads,
            num_query_groups=shape.kv_heads,
            ffn_hidden_size=shape.ffn,
            gated_linear_unit=shape.activation == "swiglu",
            activation_func=F.silu if shape.activation == "swiglu" else F.gelu,
            bias_activation_fusion=shape.activation == "swiglu",
            add_bias_linear=False,
            normalization="RMSNorm",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            tensor_model_parallel_size=size("tp"),
            pipeline_model_parallel_size=size("pp"),
            sequence_parallel=size("tp") > 1,
            gradient_accumulation_fusion=self.engine,
            apply_rope_fusion=self.engine,
            cross_entropy_loss_fusion=True,
            masked_softmax_fusion=False,
            deallocate_pipeline_outputs=True,
        )

    def _model(self, config: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt import gpt_layer_specs as specs

        local = partial(specs.get_gpt_layer_local_spec, normalization="RMSNorm")
        return GPTModel(
            config,
            specs.get_gpt_layer_with_transformer_engine_spec() if self.engine else local(),
            vocab_size=self.job.shape.vocab,
            max_sequence_length=self.job.shape.seq_len,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=self.last,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )

    def step(self) -> Tensor:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        shape = self.job.shape
        count = shape.microbatches(self.job.size("dp"))
        losses = self.run(
            forward_step_func=self._forward,
            data_iterator=iter(self.rows.next()),
            model=[self.model],
            num_microbatches=count,
            seq_length=shape.seq_len,
            micro_batch_size=shape.micro_batch,
            forward_only=False,
        )
        self.optimizer.step()
        if not self.last:
            return torch.zeros((), device="cuda")
        mean = torch.stack([each["loss"] for each in losses]).mean()
        return mean / (self.job.size("dp") * self.job.size("tp"))

    def _forward(self, rows: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = next(rows)
        tokens, labels = (t.cuda(non_blocking=True) for t in (batch.tokens, batch.labels))
        return model(tokens, self.positions, None, labels=labels), _mean

    def held(self) -> dict[str, list[Tensor]]:
        inner = [each.optimizer for each in getattr(self.optimizer, "chained_optimizers", [self.optimizer])]
        state = [t for o in inner for per in o.state.values() for t in per.values() if torch.is_tensor(t)]
        masters = [p.detach() for o in inner for group in o.param_groups for p in group["params"]]
        return {
            "weights": [p.detach() for p in self.model.parameters()],
            "gradients": [buffer.grad_data for buffer in self.model.buffers],
            "optimizer": [*state, *(p for p in masters if p.dtype == torch.float32)],
        }

    def about(self) -> dict[str, Any]:
        return {"TransformerEngine": self.engine}

    @property
    def peak_bytes(self) -> int:
        return peak_of(self.job.device)

    def close(self) -> None:
        dist.destroy_process_group()


def _mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over a microbatch's tokens; the schedule divides by the number of microbatches."""
    loss = losses.float().mean()
    return loss, {"loss": loss.detach()}
