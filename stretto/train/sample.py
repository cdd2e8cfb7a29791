"""Continue a prompt, by a model on any tensor and pipeline parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stretto.arguments import Arguments
from stretto.arguments.elsewhere import in_layout
from stretto.checkpoint import load
from stretto.collectives import all_gather, all_reduce
from stretto.models import KeyValues, Transformer
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Link, TensorMeta
from stretto.train.build import Built, build
from stretto.train.checkpointing import require_fits
from stretto.world import Axis


@dataclass(frozen=True)
class Spread:
    """A model whose stages lie on the ranks of a pipeline, one on each, and its matrices over tensor-parallel ranks."""

    stage: Transformer
    tp: Axis
    pp: Axis
    link: Link

    @classmethod
    def over(cls, stage: Transformer, state: ParallelState) -> Spread:
        """This rank's part of it. No part of the sequence alone may lie here: samples grow by single tokens."""
        pp = state.axis("pp")
        return cls(stage, state.axis("tp"), pp, Link.between(pp, state.world.device, state.axis))

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return self.link.device

    def logits(self, tokens: Tensor, before: KeyValues | None = None) -> Tensor | None:
        """Of what comes after tokens [1, s], [V] and some padding; None but on the last pipeline rank.

        With the keys and values of positions `before` them the tokens are those that follow; theirs are kept, too.
        """
        model, here = self.stage.model, self.pp.rank
        x = None
        if here > 0:
            meta = TensorMeta((tokens.shape[1], 1, model.config.hidden), next(self.stage.parameters()).dtype)
            x = self.link.recv(meta, here - 1).wait()
        x = model(x, tokens, before=before)
        if before is not None:
            before.length += tokens.shape[1]
        if here < self.pp.size - 1:
            self.link.send(x, here + 1)
            return None
        return all_gather(self.stage.lm_head(x[-1:])[0, 0], self.tp, 0)  # of the last position alone

    def agreed(self, token: int | None) -> int:
        """The token that the last pipeline rank has drawn, on all of them."""
        self.link.drain()
        mine = torch.tensor([token or 0], device=self.device)
        return int(all_reduce(mine, self.pp).item())


@torch.no_grad()
def sample(
    model: Spread,
    prompt: Sequence[int],
    n: int,
    *,
    context: int,
    vocab: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    end: int | None = None,
) -> list[int]:
    """`n` more tokens after `prompt`, fewer if `end` comes up; temperature 0 takes the likeliest each time.

    All ranks of the model call it, and get the same. The model sees the last `context` tokens. `top_k` > 0 draws from
    so many likeliest alone, `top_p` < 1 from the likeliest that together have that probability. Raises ValueError for
    an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens: give at least one")
    generator = torch.Generator().manual_seed(seed)
    tokens, before = list(prompt), KeyValues()
    for _ in range(n):
        logits, drawn = _next(model, tokens, before, context), None
        if logits is not None:
            drawn = _draw(logits[:vocab].double().cpu(), temperature, top_k, top_p, generator)
        token = model.agreed(drawn)
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _next(model: Spread, tokens: Sequence[int], before: KeyValues, context: int) -> Tensor | None:
    """Logits [V..] of what comes after `tokens`. Once they are more than the context each has another position."""
    if len(tokens) > context:
        return model.logits(torch.tensor([tokens[-context:]], device=model.device))
    return model.logits(torch.tensor([tokens[before.length :]], device=model.device), before)


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(_kept(logits / temperature, top_k, top_p), -1)
    return int(torch.multinomial(chances, 1, generator=generator))


def _kept(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [V] of the likeliest, minus infinity for the others."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        chances = torch.softmax(ordered, -1)
        beyond = chances.cumsum(-1) - chances >= top_p  # of those before it: the likeliest always stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -torch.inf)
    return logits


def load_over(args: Arguments, checkpoint: Path, state: ParallelState) -> Built:
    """The model of a checkpoint over the tensor and pipeline parallel ranks of a layout, whatever layout wrote it.

    Raises CheckpointError when it does not fit.
    """
    args = in_layout(args, state.layout)
    parallel = replace(
        args.parallel, sequence_parallel=False, tp_comm_overlap=False, ep_comm_overlap=False, sharding="none"
    )
    batch = replace(args.batch, global_batch=args.batch.micro_batch)  # no step is planned that is not made
    args = replace(args, parallel=parallel, batch=batch)
    require_fits(args, checkpoint)
    built = build(args, state, draw=False)
    weights = [s for s in built.optimizer.slices() if s.name.startswith("model/")]
    load(checkpoint, weights, state.world, group=state.axis("tp", "cp", "dp", "pp").group, prefixes=("model/",))
    built.optimizer.loaded(0)
    return built


def sampled_over(args: Arguments, checkpoint: Path, state: ParallelState) -> Spread:
    """The model of a checkpoint, to be sampled from: see `load_over`."""
    (stage,) = load_over(args, checkpoint, state).stages.values()
    return Spread.over(stage, state)
