"""Writes the PTX of every kernel for Hopper, compiled here: that needs no GPU. `python kernels_ptx.py DIRECTORY`."""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stretto.kernels import (
    adamw,
    counting_sort,
    cross_entropy,
    embedding,
    experts,
    fp8,
    grouped,
    head_norm,
    merge,
    rms_norm,
    rope,
    swiglu,
)
from stretto.kernels.launches import Launches

KERNELS = {
    "swiglu weighted": (swiglu._weighted, {"turns": 1, "block": 1024}),
    "swiglu": (swiglu._kernel, {"recompute": True, "block": 1024}),
    "rms_norm": (rms_norm._kernel, {"with_dresidual": True, "recompute": True, "turns": 3, "tall": 1, "block": 2048}),
    "rms_norm head": (
        rms_norm._kernel,
        {"with_dresidual": False, "recompute": False, "turns": 3, "tall": 16, "block": 128},
    ),
    "rms_norm weight": (rms_norm._add_up, {"turns": 7, "tall": 64, "wide": 32}),
    "embedding": (embedding._add, {"several": 8, "block": 512}),
    "fp8 add": (fp8._add, {"block": 4096}),
    "fp8 largest": (fp8._largest, {"block": 4096, "turns": 8}),
    "fp8 scale": (fp8._meaning, {"power": 15, "block": 1024}),
    "fp8 both": (fp8._quantize, {"with_plain": True, "with_flipped": True, "tall": 64, "wide": 128}),
    "fp8 flat": (fp8._quantize_flat, {"block": 4096}),
    "fp8 across": (fp8._transpose, {"tall": 64, "wide": 128}),
    "fp8 rows": (fp8._quantize_row, {"power": 8, "block": 4096}),
    "experts add": (
        experts._add_up,
        {"two": True, "weighted": True, "added": True, "slots": 8, "parts": 1, "block": 2048},
    ),
    "experts scatter": (experts._scatter, {"slots": 8, "parts": 2, "block": 2048}),
    "experts order": (experts._by_expert, {"most": 64, "block": 1024}),
    "experts count": (counting_sort._count, {"rows": 64, "wide": 64, "block": 512}),
    "experts place": (counting_sort._place, {"rows": 64, "wide": 64, "block": 512}),
    "experts products": (grouped._products, {"two": True, "add": True, "tall": 128, "wide": 256, "deep": 32}),
    "loss": (
        cross_entropy._statistics,
        {"turns": 19, "capped": False, "smoothed": False, "unit": 8, "groups": 1024, "wide": 8},
    ),
    "loss capped": (
        cross_entropy._statistics,
        {"turns": 19, "capped": True, "smoothed": True, "unit": 8, "groups": 1024, "wide": 8},
    ),
    "loss back": (cross_entropy._gradient, {"capped": False, "unit": 8, "groups": 512, "wide": 8}),
    "adamw": (adamw._kernel, {"with_rounded": True, "block": 1024}),
    "merge": (merge._merge, {"tall": 32, "block": 128}),
    "rope": (rope._turn, {"half": 64, "count": 16}),
    "rope back": (rope._back, {"half": 64, "count": 32}),
    "head norm": (head_norm._forward, {"heads": 16, "kv_heads": 8, "half": 64, "tall": 32}),
    "head norm back": (
        head_norm._backward,
        {"heads": 16, "kv_heads": 8, "q_turns": 31, "kv_turns": 16, "half": 64, "tall": 16, "stages": 4},
    ),
}
WARPS = {"experts products": 8, "loss": 16, "loss capped": 16, "loss back": 8}
POINTERS = {
    "left",
    "right",
    "logits",
    "dy",
    "gate_up",
    "out",
    "y",
    "more",
    "beside",
    "x",
    "weight",
    "dresidual",
    "dx",
    "cos",
    "sin",
    "one",
    "two",
    "three",
    "q_weight",
    "k_weight",
    "q",
    "k",
    "dq",
    "dk",
    "dv",
}
ODD = (
    "blocks",
    "eps",
    "centre",
    "left_rows",
    "right_rows",
    "tiles_out",
    "heads",
    "heads_one",
    "heads_two",
    "heads_three",
    "rotate",
    "batch",
    "tokens",
    "sent",
    "own",
    "q_tiles",
    "words",
    "pitch",
    "cap",
    "target",
    "share",
    "z",
    "change_first",
    "change_second",
)


def compiled(name: str) -> str:
    """PTX, or what Triton says against it."""
    launched, constants = KERNELS[name]
    kernel = launched.kernel if isinstance(launched, Launches) else launched
    signature = {n: "constexpr" if n in constants else _type(n) for n in kernel.arg_names}
    # What Triton finds out when a kernel is called: addresses and sizes are multiples of 16.
    known = [n for n, arg in enumerate(kernel.arg_names) if arg.removeprefix("more_") not in (*constants, *ODD)]
    source = ASTSource(kernel, signature, constants, {(n,): [["tt.divisibility", 16]] for n in known})
    try:
        ptx: str = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS.get(name, 4)}
        ).asm["ptx"]
    except Exception as error:  # noqa: BLE001  # whatever its compiler raises
        return f"{type(error).__name__}: {error}"
    return ptx


def _type(arg: str) -> str:
    arg = arg.removeprefix("more_")  # of a second part
    others = {
        "eps": "fp32",
        "centre": "fp32",
        "left_rows": "tensordesc<bf16[32,128]>",
        "right_rows": "tensordesc<bf16[32,256]>",
        "tiles_out": "tensordesc<fp32[128,256]>",
        "lse": "*fp32",
        "one_lse": "*fp32",
        "two_lse": "*fp32",
        "shares": "*fp32",
        "programs": "i32",
        "counts": "*i64",
        "keys": "*i64",
        "of_blocks": "*i32",
        "places": "*i64",
        "totals": "*i64",
        "order": "*i64",
        "inverse": "*i64",
        "count": "i32",
        "scale": "*fp32",
        "ends": "*i32",
        "plain": "*fp8e4nv",
        "flipped": "*fp8e4nv",
        "into": "*fp8e4nv",
        "small": "*u8",
        "transposed": "*u8",
    }
    others |= dict.fromkeys(("top", "exps", "label", "below", "highest"), "*fp32") | {"local": "*i64", "mine": "*i1"}
    others |= dict.fromkeys(("cap", "target", "share", "z", "change_first", "change_second"), "fp32")
    others |= dict.fromkeys(("master", "grad", "first", "second", "keep", "rate", "correction"), "*fp32")
    others |= {"rounded": "*bf16"}
    others |= {"total": "*fp32", "part": "*bf16", "weights": "*fp32", "dweights": "*fp32", "back": "*i64"}
    return "*bf16" if arg in POINTERS else others.get(arg, "i32")


if __name__ == "__main__":
    for each in KERNELS:
        (Path(sys.argv[1]) / each).write_text(compiled(each))
