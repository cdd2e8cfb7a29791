"""torchtitan's Llama of a job's shape."""

from __future__ import annotations

from benchmarks.train.peers import RunRejectedError
from benchmarks.train.peers.torchtitan_trainer import Torchtitan, ffn_args, need_gpu
from benchmarks.train.shapes import Job


class Peer(Torchtitan):
    """See `benchmarks.train.peers.Peer`. Variants under dp: "" is DDP, "fsdp"."""

    def setup(self, job: Job) -> None:
        """Its initial weights are its own."""
        shape = job.shape
        if shape.activation != "swiglu":
            raise RunRejectedError("torchtitan's Llama has SwiGLU alone")
        need_gpu(job)
        if self.variant and job.parallel != "dp":
            raise RunRejectedError("torchtitan-fsdp is a way to use several devices as dp")
        from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec

        model_args = TransformerModelArgs(
            dim=shape.hidden,
            n_layers=shape.layers,
            n_heads=shape.heads,
            n_kv_heads=shape.kv_heads,
            vocab_size=shape.vocab,
            max_seq_len=shape.seq_len,
            **ffn_args(shape.hidden, shape.ffn),
        )
        self.start(job, get_train_spec(), model_args)
