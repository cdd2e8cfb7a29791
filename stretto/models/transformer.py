"""A decoder-only transformer, whole or the part of it that one pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.attention import Attend, causal_attention
from stretto.batch import Batch
from stretto.estimate.kept import BLOCK, NOTHING, Parts
from stretto.models.block import Block, Rotations
from stretto.models.block_ops import BlockOps
from stretto.models.cache import KeyValues
from stretto.models.frequencies import frequencies
from stretto.models.further import FurtherBlock, shifted
from stretto.models.halves import STOPS, Half, Halves
from stretto.models.norm import norm
from stretto.models.offload import Offload
from stretto.models.positions import Positions
from stretto.models.recomputed import recomputed
from stretto.models.rope import rotation
from stretto.models.stage_spec import StageSpec
from stretto.params import Init, ParamSpec
from stretto.schedule.blocks import StageBlock
from stretto.streams import Stream
from stretto.structure import Structure
from stretto.tensor_parallel import (
    Build,
    Dropout,
    LossTerms,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_spec,
)
from stretto.tensor_parallel.layers import expect


@dataclass(frozen=True)
class Microbatch:
    """What a stage is called with: the rows, and by what their summed loss is divided.

    `count` [] is the number of valid tokens in the whole global batch, over all microbatches and data-parallel
    ranks; dividing by it here is why gradients of microbatches and ranks simply add up.
    """

    batch: Batch
    count: Tensor
    structure: Structure | None = None
    """Where the tokens stand; None: each row is one document, whole on this rank."""

    @property
    def known_structure(self) -> Structure:
        """It, or that of plain rows."""
        if self.structure is not None:
            return self.structure
        return Structure.of_tokens(self.batch.tokens.shape[1], self.batch.samples)


class Transformer(nn.Module):
    """Called as `module(x, microbatch)`.

    x is the activation [s(/t), b, h] from the stage before, None on the first stage; the result is the activation
    for the next stage, or on the last stage the loss []. Names are those of the Hugging Face Llama, with global
    layer numbers. `recompute` says of a layer which parts the backward recomputes instead of keeping them, to
    the same bits; of a block only what enters it is kept. `attend(layer)` computes the attention.
    With `offload` what enters blocks waits in the host's memory. With `halves` a microbatch goes through blocks in two
    halves of its samples, one of which computes while messages of the other's experts are under way. `embedding` is
    that of another stage on this rank, for a head that is tied to it. `terms` are those of the loss.
    """

    def __init__(
        self,
        config: ModelConfig,
        part: StageSpec,
        build: Build,
        *,
        seq_len: int,
        recompute: Mapping[int, Parts] = MappingProxyType({}),
        offload: bool = False,
        halves: bool = False,
        attend: Callable[[int], Attend] = lambda _: causal_attention,
        embedding: nn.Parameter | None = None,
        terms: LossTerms = LossTerms(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(
            config,
            part,
            build,
            seq_len=seq_len,
            recompute=recompute,
            offload=offload,
            halves=halves and any(block.feed_forward and config.is_sparse(block.layer) for block in part.blocks),
            attend=attend,
        )
        if part.last:
            if self.model.embed_tokens is not None:
                embedding = self.model.embed_tokens.weight
            head = _embedding(config) if config.tied else vocab_spec(config.vocab_size, config.hidden, _init(config))
            self.lm_head = VocabParallelHead(
                head, build, weight=embedding if config.tied else None, softcap=config.logit_softcap, terms=terms
            )
            self.further_losses = torch.zeros((2, config.mtp_layers), dtype=torch.float64, device=build.device)
            """Of each further token: the loss, summed over the microbatches of a step as the model's own is, and what
            its tokens are of those that the model predicts. Who begins a step sets them to 0."""
            if config.mtp_layers:
                shared = self.lm_head.weight if config.tied else embedding
                self.next_embedding = VocabParallelEmbedding(_embedding(config), build, weight=shared)
                for n in range(config.mtp_layers):  # each is a use of both, the first of the embedding is counted
                    expect(self.lm_head.weight, build)
                    if n:
                        expect(self.next_embedding.weight, build)

    def sections(self) -> list[list[nn.Module]]:
        """What is used together, in the order of the forward: embeddings, each block, final norm, head and what
        predicts further tokens."""
        trunk = self.model
        further = [getattr(self, "next_embedding", None), *trunk.further] if trunk.last else []
        ends = ([trunk.embed_tokens, trunk.embed_positions], [trunk.norm, getattr(self, "lm_head", None), *further])
        first, last = ([module for module in end if module is not None] for end in ends)
        return [each for each in (first, *([block] for block in trunk.blocks.values()), last) if each]

    def forward(self, x: Tensor | None, microbatch: Microbatch) -> Tensor:
        batch = microbatch.batch
        x = self.model(x, batch.tokens, microbatch.known_structure)
        if not self.model.last:
            return x
        loss = self.lm_head.loss(x, batch.labels, batch.loss_mask.double() / microbatch.count)
        if not self.config.mtp_layers or not torch.is_grad_enabled():  # an evaluation is of the model alone
            return loss
        further = self._further(x, microbatch)
        return loss + (further - further.detach())  # told is the loss of the next token

    def _further(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """The losses of the tokens after the next, weighted, []: of `x`, what the head reads."""
        config, structure = self.config, microbatch.known_structure
        share, total = config.mtp_loss / config.mtp_layers, torch.zeros((), dtype=torch.float64, device=x.device)
        turns = self.model.turns(structure, x)
        for n, (block, said) in enumerate(zip(self.model.further, shifted(microbatch.batch), strict=True)):
            read, wanted, counts = said
            embedded = self.model.scaled(self.next_embedding(read))
            whole = self.model.recompute.get(block.layer) == BLOCK
            inputs = (x, embedded, turns, structure)
            x = recomputed(block.further, *inputs) if whole else block.further(*inputs)
            weights = counts.double() / microbatch.count
            loss = self.lm_head.loss(x, wanted, weights * share)
            self.further_losses[:, n] += torch.stack([loss.detach() / share, weights.sum()]) if share else 0.0
            total = total + loss
        return total

    def logits(self, tokens: Tensor, before: KeyValues | None = None) -> Tensor:
        """Next-token logits [s, b, V/t] of tokens [b, s]; the model must be whole.

        With the keys and values of positions `before` them the tokens are those that follow; theirs are kept, too.
        """
        logits: Tensor = self.lm_head(self.model(None, tokens, before=before))
        if before is not None:
            before.length += tokens.shape[1]
        return logits


class Backbone(nn.Module):
    """Embedding, blocks and final norm, as far as they lie on this stage."""

    def __init__(
        self,
        config: ModelConfig,
        part: StageSpec,
        build: Build,
        *,
        seq_len: int,
        recompute: Mapping[int, Parts],
        offload: bool,
        halves: bool,
        attend: Callable[[int], Attend],
    ) -> None:
        super().__init__()
        self.beside = [Stream.of(torch.device(build.device)) for _ in STOPS] if halves else []
        """A stream for the messages of each half; none where a microbatch is whole."""
        self.config, self.last, self.recompute, self.offload = config, part.last, recompute, offload
        self._rotations: dict[tuple[int, torch.dtype, torch.device], Rotations] = {}
        learned = part.first and config.position == "learned"
        self.embed_tokens = VocabParallelEmbedding(_embedding(config, ""), build) if part.first else None
        self.embed_positions = Positions(config, build, seq_len) if learned else None
        self.dropout = Dropout(config.dropout, "model.embed_tokens", build) if part.first else None
        shared = BlockOps.of(config, build, attend)
        here = [*part.blocks, *(StageBlock(n) for n in config.further_layers if part.last)]
        ops = {block.layer: shared.recomputing(recompute.get(block.layer, NOTHING)) for block in here}
        twice = replace(build, uses=2) if halves else build
        self.layers = nn.ModuleDict({str(b.layer): Block(config, twice, b, ops[b.layer]) for b in part.blocks})
        self.blocks = dict(self.layers.items())
        """Those of the model itself."""
        self.further = [FurtherBlock(config, build, n, ops[n]) for n in config.further_layers if part.last]
        self.layers.update({str(block.layer): block for block in self.further})  # as their names have it
        # What leaves the last block is kept: head and loss take it a piece at a time.
        self.norm = norm(config, build, replace(shared.norm, recompute=False)) if part.last else None

    def forward(
        self, x: Tensor | None, tokens: Tensor, structure: Structure | None = None, before: KeyValues | None = None
    ) -> Tensor:
        if structure is None:
            structure = Structure.of_tokens(tokens.shape[1], first=0 if before is None else before.length)
        if self.embed_tokens is not None:
            x = self.scaled(self.embed_tokens(tokens))
        if self.embed_positions is not None:
            x = self.embed_positions(x, structure)
        if x is None:
            raise ValueError("this stage does not hold the embedding: it must be called with an activation")
        if self.dropout is not None:
            x = self.dropout(x, structure)
        x = self._through(x, structure, before)
        if self.norm is None:
            return x
        normed: Tensor = self.norm(x).output
        return normed

    def _through(self, x: Tensor, structure: Structure, before: KeyValues | None) -> Tensor:
        """Through the blocks."""
        if self.beside and torch.is_grad_enabled():
            halves = Halves.of(x, structure, partial(self.turns, like=x), self.beside)
            for layer, block in self.blocks.items():
                if self.recompute.get(int(layer)) == BLOCK:
                    halves = halves.each(partial(_recomputed_half, block))
                else:
                    halves = block(halves, None, structure)
            return halves.joined()
        turns = self.turns(structure, x)
        away, last = Offload(), len(self.blocks) - 1
        for n, (layer, block) in enumerate(self.blocks.items()):
            if self.offload and before is None:
                x = away(block, x, turns, structure, stays=n == last)
            elif self.recompute.get(int(layer)) == BLOCK and before is None:
                x = recomputed(block, x, turns, structure)
            else:
                x = block(x, turns, structure, before)
        return x

    def scaled(self, x: Tensor) -> Tensor:
        """Embeddings as the first block takes them."""
        if not self.config.scale_embedding:
            return x
        # By a number of the activations' dtype, as Gemma has it.
        return x * torch.full((), self.config.hidden**0.5, dtype=x.dtype, device=x.device)

    def turns(self, structure: Structure, like: Tensor) -> Rotations | None:
        """Angles of the tokens that are here."""
        found = self._rotation(structure.length, like)
        return None if found is None else found.at(structure)

    def _rotation(self, seq_len: int, like: Tensor) -> Rotations | None:
        c, key = self.config, (seq_len, like.dtype, like.device)
        if c.position != "rope":
            return None
        if key not in self._rotations:
            whole, windowed = (
                rotation(seq_len, *frequencies(c, seq_len, windowed=w), dtype=like.dtype, device=like.device)
                for w in (False, True)
            )
            self._rotations[key] = Rotations(whole, windowed)
        return self._rotations[key]


def _recomputed_half(block: nn.Module, half: Half, x: Tensor) -> Tensor:
    return recomputed(block, x, half.turns, half.structure)


def _init(config: ModelConfig) -> Init:
    return Init(std=config.init_std)


def _embedding(config: ModelConfig, name: str = "model.embed_tokens.weight") -> ParamSpec:
    """Of the embedding; elsewhere than in its own place it has its name."""
    shared = config.shared_embedding
    return vocab_spec(config.vocab_size, config.hidden, _init(config), tied=shared, name=name)
