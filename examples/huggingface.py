"""A model of transformers over tensor and data parallel ranks, with checkpoints; started again, it goes on.

python examples/huggingface.py          # 4 local processes: tp=2 x dp=2
python examples/huggingface.py 1        # the same model in one process: the same losses
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

import stretto

ROWS, MICRO, SEQ, VOCAB = 16, 4, 32, 101


def model(dtype=torch.float32):
    """A Llama, as `AutoModelForCausalLM.from_pretrained` would give a large one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, use_cache=False, pad_token_id=None, **sizes)
    return LlamaForCausalLM(config).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens that count upwards from anywhere, and what follows each: [ROWS, SEQ], all rows on every rank."""
    first = torch.randint(VOCAB, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    tokens = (first + torch.arange(SEQ + 1)) % VOCAB
    return tokens[:, :-1], tokens[:, 1:]


def loss(output, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())


def train(world: stretto.World, layout: stretto.Layout, steps: int = 60, listeners=(), dtype=torch.float32, **more):
    with stretto.ParallelState.build(layout, world) as state:
        llama, tp = model(dtype), state.axis("tp")
        stretto.parallelize(llama, stretto.plan_of(llama, tp), tp)
        said = {"data": batch, "loss": loss, "lr": 3e-3, "global_batch": ROWS, "micro_batch": MICRO, "dtype": dtype}
        with stretto.Trainer(llama, state, save_every=30, resume=True, **said, **more) as trainer:
            return trainer.fit(steps, listeners)


def main() -> int:
    with stretto.initialize() as world:
        tp = 2 if world.size % 2 == 0 else 1
        layout = stretto.Layout.of(tp=tp, dp=world.size // tp)
        train(world, layout, listeners=[stretto.LiveProgress()], out="runs/huggingface")
    return 0


if __name__ == "__main__":
    sys.exit(stretto.run_local(int(sys.argv[1]) if sys.argv[1:] else 4, main))
