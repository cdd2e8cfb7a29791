"""Megatron-LM's flags of mixture of experts, where they take more than copying a value."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Final

from stretto.compat.megatron.given import Given, RejectedError, Setting, choice, number, one, positive

FLAGS = (
    *("--moe-router-load-balancing-type", "--moe-aux-loss-coeff", "--moe-router-score-function"),
    *("--moe-router-pre-softmax", "--moe-expert-capacity-factor", "--moe-token-drop-policy", "--moe-layer-freq"),
)
SWITCHED = ("--moe-router-pre-softmax", "--moe-grouped-gemm", "--moe-permute-fusion", "--moe-shared-expert-overlap")
"""Flags without a value that no setting copies."""

MOST: Final = 1 << 16
"""Layers that a list may name."""

CAPACITY = (
    "--moe-expert-capacity-factor: Megatron-LM counts what a rank holds of a microbatch, here the limit is on each "
    "sequence: which tokens are dropped does not depend on the layout"
)


def experts(g: Given) -> Iterator[Setting]:
    """Router, balance, capacity and sparse layers of a model with experts."""
    if "--num-experts" not in g:
        return
    kind = "--moe-router-load-balancing-type"
    types = {"aux_loss": "aux", "global_aux_loss": "aux", "seq_aux_loss": "", "none": "none", "sinkhorn": ""}
    balance = choice(g, kind, types) if kind in g else "aux"
    if balance == "":
        raise RejectedError(kind, f"{one(g, kind)} is not available: say aux_loss, global_aux_loss or none")
    if balance == "aux" and (flag := "--moe-aux-loss-coeff") in g:
        yield "model.balance_loss", number(g, flag), flag
    score = "--moe-router-score-function"
    sigmoid = score in g and choice(g, score, {"softmax": "", "sigmoid": "yes"}) == "yes"
    if sigmoid:
        yield "model.router", "sigmoid", score
    elif (flag := "--moe-router-pre-softmax") in g:  # Megatron-LM does not divide by the sum then
        yield "model.router", "softmax", flag
        yield "model.router_renormalize", False, flag
    else:
        yield "model.router", "softmax-top-k", f"no {flag}: softmax over the chosen"
    if sigmoid and "--moe-router-num-groups" in g:
        yield "model.router_group_score", "top2", f"{score} sigmoid"
    if "--expert-tensor-parallel-size" not in g and (flag := "--tensor-model-parallel-size") in g:
        yield "parallel.etp", positive(g, flag), f"no --expert-tensor-parallel-size: {flag}"
    yield from _capacity(g)
    yield from _layers(g)


def _capacity(g: Given) -> Iterator[Setting]:
    flag, policy = "--moe-expert-capacity-factor", "--moe-token-drop-policy"
    if flag not in g:
        return
    yield "model.expert_capacity", number(g, flag), flag
    drop = choice(g, policy, {"probs": "lowest", "position": "last"}) if policy in g else "lowest"
    yield "model.expert_drop", drop, policy


def _layers(g: Given) -> Iterator[Setting]:
    """Each n-th layer, counted from the first in Megatron-LM; or a list with a 1 for each sparse layer, which a script
    writes as ([0]*1+[1]*26) or [1,0]*12."""
    flag = "--moe-layer-freq"
    if flag not in g:
        return
    said, layers = one(g, flag).replace(" ", ""), positive(g, "--num-layers") if "--num-layers" in g else 0
    if said == "1" or not layers:  # without layers that is what is wrong
        return
    kinds = [int(n % int(said) == 0) for n in range(layers)] if re.fullmatch(r"[1-9]\d{0,5}", said) else _kinds(said)
    if kinds is None:
        raise RejectedError(flag, f"{said!r:.60} is not available: say 1, or a list such as '([0]*1+[1]*26)'")
    if len(kinds) != layers:
        raise RejectedError(flag, f"{said!r:.60} names {len(kinds)} layers, --num-layers {layers}")
    dense = tuple(n for n, sparse in enumerate(kinds) if not sparse)
    if dense == tuple(range(len(dense))):
        yield "model.first_dense", len(dense), flag
    else:
        yield "model.dense_layers", dense, flag


def _kinds(said: str) -> list[int] | None:
    """The list that an expression of Python's makes by + and *; None for anything else. Nothing is evaluated."""
    try:
        made = _made(ast.parse(said, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return made if isinstance(made, list) else None


def _made(node: ast.expr) -> list[int] | int:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return min(number, MOST)
        case ast.List(elts=each):
            made = [_made(one) for one in each]
            if all(isinstance(one, int) and one in (0, 1) for one in made):
                return [one for one in made if isinstance(one, int)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _made(left), _made(right)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            first, second = _made(left), _made(right)
            if isinstance(second, list):
                first, second = second, first
            if isinstance(first, list) and isinstance(second, int) and len(first) * second <= MOST:
                return first * second
    raise ValueError(f"no list of layers: {ast.dump(node)[:60]}")
