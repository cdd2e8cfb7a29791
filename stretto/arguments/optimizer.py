"""Settings of how weights are updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stretto.arguments.setting import setting


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule, its learning-rate schedule and clipping."""

    optimizer: Literal["adamw", "sgd", "lion", "muon"] = setting(
        "adamw",
        "update rule; the decay of sgd is added to the gradient, that of the others is decoupled; muon is AdamW for "
        "embeddings, head, norms and biases",
    )
    lr: float = setting(1e-3, "peak learning rate", above=0)
    min_lr: float = setting(1e-4, "learning rate at the end of the decay", at_least=0)
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine", "shape of the decay; wsd (warm-up, stable, decay) stays at the peak until the cooldown"
    )
    warmup_steps: int = setting(20, "the rate grows linearly up to lr over so many steps", unit="steps", at_least=0)
    decay_steps: int | None = setting(
        None, "step at which min_lr is reached, counted from step 0", unit="steps", at_least=1
    )
    cooldown_steps: int | None = setting(
        None, "wsd: length of the final decay, which ends at decay_steps", unit="steps", at_least=1
    )
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices", at_least=0)
    param_groups: str = setting(
        "",
        "what is otherwise for parameters, by name: `*norm*|*.bias: weight_decay=0; *embed*: lr=0.5` (lr multiplies)",
    )
    beta1: float = setting(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = setting(0.95, "decay of the second moment", at_least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    momentum: float = setting(0.9, "sgd, muon: decay of the momentum", at_least=0, below=1)
    moments: Literal["fp32", "bf16"] = setting(
        "fp32", "dtype of the update rule's state; fp32: that of the masters, fp32 or wider"
    )
    masters: Literal["fp32", "remainder"] = setting(
        "fp32",
        "master weights of a run in bf16: a copy in fp32; or remainder: 16 bits that, with the weights themselves, are "
        "the same fp32 numbers (weights are rounded with ties away from zero)",
    )
    optimizer_cpu_offload: bool = setting(
        False,
        "masters and moments lie in the host's memory, and pass through the device a chunk at a time, beside the next "
        "forward: the same update to the last bit",
        carried=False,
    )
    clip_grad: float = setting(1.0, "gradients are scaled down to this global norm; 0: never", at_least=0)
    post_validate: bool = setting(
        False,
        "update before the norm of all gradients is known, and take the update back, bit for bit, where it was above "
        "clip_grad: no rank of a pipeline waits for it; costs a copy of gradients and optimizer state",
        carried=False,
    )
