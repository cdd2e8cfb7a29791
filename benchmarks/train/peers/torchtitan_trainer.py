"""torchtitan 0.2.2: its own trainer and step, on the tokens of a job; it must be installed, with what it needs."""

from __future__ import annotations

import ast
import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.train.data import Rows
from benchmarks.train.peers import RunRejectedError, peak_of
from benchmarks.train.peers.torch_masters import local_of
from benchmarks.train.shapes import Job

NAME = "benchmark"


class Tokens:
    """The rows of the run in the form of torchtitan's data loaders; has no state to save."""

    def __init__(self, job: Job, rank: int) -> None:
        self.rows = Rows(job, rank)
        self.whole = job.size("pp") > 1
        """A pipeline cuts the batch of a step itself."""

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            pairs = [(b.tokens.pin_memory(), b.labels.pin_memory()) for b in self.rows.next()]
            if self.whole:
                pairs = [(torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]))]
            yield from (({"input": tokens}, labels) for tokens, labels in pairs)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the benchmark saves no checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Torchtitan:
    """A model in torchtitan's trainer, which makes the steps of a job; see `benchmarks.train.peers.Peer`."""

    def __init__(self, variant: str = "") -> None:
        """Variants under dp: "" is DDP, "fsdp"."""
        self.variant = variant

    def start(self, job: Job, spec: Any, model_args: Any) -> None:
        """Its trainer, of this spec's model with these arguments. Raises RunRejectedError."""
        from torchtitan.protocols.train_spec import register_train_spec
        from torchtitan.train import Trainer

        self.job = job
        own = replace(
            spec,
            model_args={NAME: model_args},
            build_tokenizer_fn=None,
            build_validator_fn=None,
            state_dict_adapter=None,
            build_dataloader_fn=lambda dp_rank, **_: Tokens(job, dp_rank),
            parallelize_fn=_mixed(spec.parallelize_fn),
        )
        register_train_spec(NAME, own)
        self.trainer = Trainer(self._config())
        self.trainer.step = 1  # the first step alone would log
        self.batches = self.trainer.batch_generator(self.trainer.dataloader)
        self.losses: list[Tensor] = []
        inner = self.trainer.forward_backward_step

        def remembering(**said: Any) -> Tensor:
            loss: Tensor = inner(**said)
            self.losses.append(local_of(loss.detach()))
            return loss

        self.trainer.forward_backward_step = remembering

    def _config(self) -> Any:
        from torchtitan.config import JobConfig

        job, shape, size = self.job, self.job.shape, self.job.size
        microbatches = shape.microbatches(size("dp"))
        said = {
            "job.dump_folder": tempfile.mkdtemp(),
            "model.name": NAME,
            "model.flavor": NAME,
            "optimizer.lr": job.lr,
            "lr_scheduler.warmup_steps": 0,
            "metrics.log_freq": 10**9,
            "training.local_batch_size": shape.micro_batch * (microbatches if size("pp") > 1 else 1),
            "training.global_batch_size": shape.global_batch,
            "training.seq_len": shape.seq_len,
            "training.max_norm": 1.0,
            "training.steps": 1_000_000,
            "training.mixed_precision_param": "bfloat16" if job.dtype == "bf16" else "float32",
            "parallelism.data_parallel_replicate_degree": 1 if self.variant == "fsdp" else size("dp"),
            "parallelism.data_parallel_shard_degree": size("dp") if self.variant == "fsdp" else 1,
            "parallelism.tensor_parallel_degree": size("tp"),
            "parallelism.pipeline_parallel_degree": size("pp"),
            "parallelism.pipeline_parallel_microbatch_size": shape.micro_batch,
            "activation_checkpoint.mode": "none",
            "compile.enable": job.compile,
        }
        pairs = (word.partition("=") for word in shlex.split(job.words))
        said |= {path: _value(text) for path, _, text in pairs}
        config = JobConfig()
        for path, value in said.items():
            section, _, name = path.rpartition(".")
            target = config
            for part in section.split("."):
                target = getattr(target, part)
            if not hasattr(target, name):
                raise RunRejectedError(f"torchtitan has no setting {path}")
            setattr(target, name, value)
        return config

    def step(self) -> Tensor:
        """See `benchmarks.train.peers.Peer`."""
        self.losses.clear()
        self.trainer.step += 1
        self.trainer.train_step(self.batches)
        if self.job.size("pp") > 1 and not self.trainer.pp_has_last_stage:
            return torch.zeros((), device=self.trainer.device)
        return torch.stack([loss.reshape(()) for loss in self.losses]).sum() / self.job.size("tp")

    def held(self) -> dict[str, list[Tensor]]:
        """See `benchmarks.train.peers.Peer`."""
        params = [p for model in self.trainer.model_parts for p in model.parameters()]
        state = [
            t
            for each in self.trainer.optimizers
            for per in each.state.values()
            for t in per.values()
            if torch.is_tensor(t)
        ]
        return {
            "weights": [],  # the fp32 parameters are the masters; bf16 copies come and go
            "gradients": [local_of(p.grad) for p in params if p.grad is not None],
            "optimizer": [local_of(t) for t in (*state, *(p.detach() for p in params))],
        }

    def about(self) -> dict[str, Any]:
        """See `benchmarks.train.peers.Peer`."""
        config = self.trainer.job_config
        recomputed = config.activation_checkpoint.mode
        return {"words": self.job.words, "compiled": config.compile.enable, "recomputed": recomputed}

    @property
    def peak_bytes(self) -> int:
        """See `benchmarks.train.peers.Peer`."""
        return peak_of(self.job.device)

    def close(self) -> None:
        """See `benchmarks.train.peers.Peer`."""
        self.trainer.close()
        dist.destroy_process_group()


def _mixed(parallelize: Callable[..., Any]) -> Callable[..., Any]:
    """Over tp or pp torchtitan computes in the dtype of its weights unless it shards them, too.

    So they are sharded over one rank, in its own way: bf16 copies of fp32 weights, gradients added up in fp32.
    """

    def parallelized(model: Any, parallel_dims: Any, job_config: Any) -> Any:
        model = parallelize(model, parallel_dims, job_config)
        if not parallel_dims.fsdp_enabled and (parallel_dims.tp_enabled or parallel_dims.pp_enabled):
            from torchtitan.config import TORCH_DTYPE_MAP
            from torchtitan.models.llama3.infra.parallelize import apply_fsdp

            dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
            mesh = parallel_dims._meshes["fsdp"]  # `get_mesh` has none of one rank
            reshard = {"reshard_after_forward_policy": "never"}
            apply_fsdp(model, mesh, dtype, torch.float32, pp_enabled=parallel_dims.pp_enabled, **reshard)
        return model

    return parallelized


def ffn_args(hidden: int, ffn: int) -> dict[str, Any]:
    """What its Llama must be told to have a feed-forward of this width: it multiplies int(8/3 of hidden)."""
    return {"ffn_dim_multiplier": (ffn + 0.5) / int(8 * hidden / 3), "multiple_of": 1}


def need_gpu(job: Job) -> None:
    """Raises RunRejectedError: its trainer asks the device for what a CPU does not know."""
    if job.device != "cuda":
        raise RunRejectedError("torchtitan is measured on GPUs alone")


def _value(text: str) -> Any:
    """A literal of Python, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
