"""Which tensor of a Hugging Face file holds which logical tensors, and where in it.

Our logical names are those of Llama and of the families named after it, so most files hold logical tensors as they
are. Others stack several of them, head by head, row by row or one after the other, and some are transposed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from stretto.arguments.model import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Full shapes of the logical tensors of a model, by name."""


@dataclass(frozen=True)
class Piece:
    """A logical tensor of `shape` inside a tensor of a file: `rows` of it from row `start` on in each of its groups."""

    logical: str
    shape: tuple[int, ...]
    start: int
    rows: int
    in_turn: bool = False
    """Whether groups are single rows, of which each `stride`-th is one of this tensor."""

    def runs(self, first: int, count: int, stride: int) -> Iterator[tuple[slice, slice]]:
        """Rows `first`.. of the logical tensor, and where they are in the file, whose groups have `stride` rows."""
        if self.in_turn and count:
            begin = first * stride + self.start
            yield slice(first, first + count), slice(begin, begin + (count - 1) * stride + 1, stride)
            return
        row = first
        while row < first + count:
            group, within = divmod(row, self.rows)
            n = min(self.rows - within, first + count - row)
            at = group * stride + self.start + within
            yield slice(row, row + n), slice(at, at + n, 1)
            row += n


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file, the logical ones that it is made of, and whether it is stored transposed.

    Where it is a stack of so many (`stack`), such as one for each expert, its pieces are those of the first, then those
    of the second and so on.
    """

    name: str
    pieces: tuple[Piece, ...]
    transposed: bool = False
    stack: int = 0

    @property
    def of_one(self) -> tuple[Piece, ...]:
        """The pieces of the first of a stack."""
        return self.pieces[: len(self.pieces) // max(1, self.stack)]

    def place(self, n: int) -> int | None:
        """Which of a stack piece `n` is in."""
        return n // len(self.of_one) if self.stack else None

    @property
    def stride(self) -> int:
        """Rows of one group, all pieces together."""
        return sum(piece.rows for piece in self.of_one)

    @property
    def shape(self) -> tuple[int, ...]:
        """As it stands in the file."""
        first = self.pieces[0].shape
        whole = (sum(piece.shape[0] for piece in self.of_one), *first[1:])
        whole = whole[::-1] if self.transposed else whole
        return (self.stack, *whole) if self.stack else whole

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


_NEOX: Final = (
    (r"model\.embed_tokens\.", "gpt_neox.embed_in."),
    (r"lm_head\.", "embed_out."),
    (r"model\.norm\.", "gpt_neox.final_layer_norm."),
    (r"model\.layers\.", "gpt_neox.layers."),
    (r"\.self_attn\.o_proj\.", ".attention.dense."),
    (r"\.self_attn\.", ".attention."),
    (r"\.mlp\.up_proj\.", ".mlp.dense_h_to_4h."),
    (r"\.mlp\.down_proj\.", ".mlp.dense_4h_to_h."),
)
_GPT2: Final = (
    (r"model\.embed_tokens\.", "transformer.wte."),
    (r"model\.embed_positions\.", "transformer.wpe."),
    (r"model\.norm\.", "transformer.ln_f."),
    (r"model\.layers\.", "transformer.h."),
    (r"\.input_layernorm\.", ".ln_1."),
    (r"\.post_attention_layernorm\.", ".ln_2."),
    (r"\.self_attn\.o_proj\.", ".attn.c_proj."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.up_proj\.", ".mlp.c_fc."),
    (r"\.mlp\.down_proj\.", ".mlp.c_proj."),
)
_MIXTRAL: Final = (
    (r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1."),
    (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
    (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
    (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
)
_QWEN2: Final = ((r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),)
_GPT_OSS: Final = (
    (r"\.mlp\.gate\.", ".mlp.router."),
    (r"\.experts\.\d+\.(gate|up)_proj\.weight", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.(gate|up)_proj\.bias", ".experts.gate_up_proj_bias"),
    (r"\.experts\.\d+\.down_proj\.weight", ".experts.down_proj"),
    (r"\.experts\.\d+\.down_proj\.bias", ".experts.down_proj_bias"),
)
_RENAMED: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "gpt_neox": _NEOX,
    "gpt2": _GPT2,
    "mixtral": _MIXTRAL,
    "qwen2_moe": _QWEN2,
    "gpt_oss": _GPT_OSS,
}
EMBEDDING: Final = "model.embed_tokens.weight"

PREDICTS_FURTHER: Final = frozenset(("deepseek_v3", "glm4_moe"))
"""Families whose files have layers that predict further tokens, behind the last one."""

_STACKED: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "gpt_neox": {"query_key_value": ("q_proj", "k_proj", "v_proj")},
    "gpt2": {"c_attn": ("q_proj", "k_proj", "v_proj")},
    "phi3": {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
}
_TRANSPOSED: Final = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$|\.experts\.(gate_up|down)_proj$")

BUFFERS: Final = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
"""Names of what old files hold besides parameters: masks and frequencies, which follow from the configuration."""


def further_copies(model: ModelConfig) -> dict[str, str]:
    """What files hold once more in each layer that predicts further tokens, and which logical tensor it is."""
    head = EMBEDDING if model.tied else "lm_head.weight"
    names = (("embed_tokens", EMBEDDING), ("shared_head.head", head))
    return {f"model.layers.{n}.{held}.weight": name for n in model.further_layers for held, name in names}


def file_tensors(family: str, model: ModelConfig, shapes: Shapes) -> tuple[FileTensor, ...]:
    """All tensors of a file of that family, in the order of the logical ones."""
    stacks = {part: whole for whole, parts in _STACKED.get(family, {}).items() for part in parts}
    found: dict[str, list[str]] = {}
    for name in shapes:
        held = re.search(r"\.([a-z]+_proj)\.", name)
        whole = stacks.get(held[1], held[1]) if held else ""
        said = name.replace(f".{held[1]}.", f".{whole}.") if held else name
        for pattern, theirs in _RENAMED.get(family, ()):
            said = re.sub(pattern, theirs, said)
        found.setdefault(said, []).append(name)
    return tuple(_tensor(family, model, name, parts, shapes) for name, parts in found.items())


def _tensor(family: str, model: ModelConfig, name: str, parts: list[str], shapes: Shapes) -> FileTensor:
    groups = model.heads if family == "gpt_neox" and len(parts) > 1 else 1  # q, k and v of a head lie side by side
    stack = model.experts if family == "gpt_oss" and ".experts." in name else 0
    each = len(parts) // max(1, stack)
    in_turn = stack > 0 and each > 1  # rows of gate and up
    if in_turn:
        groups = shapes[parts[0]][0]
    pieces, start = [], 0
    for n, part in enumerate(parts):
        rows = shapes[part][0] // groups
        start = 0 if n % each == 0 else start
        pieces.append(Piece(part, shapes[part], start, rows, in_turn))
        start += rows
    transposed = family in ("gpt2", "gpt_oss") and _TRANSPOSED.search(name) is not None
    return FileTensor(name, tuple(pieces), transposed, stack)
