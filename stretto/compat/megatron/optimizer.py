"""Megatron-LM's flags about the state of the optimizer: its dtypes, and where it lies."""

from __future__ import annotations

from collections.abc import Iterator

from stretto.compat.megatron.given import Given, RejectedError, Setting, choice, number

OFFLOAD, FRACTION, AWARE = "--optimizer-cpu-offload", "--optimizer-offload-fraction", "--use-precision-aware-optimizer"
FIRST, SECOND, PARAMS, GRADS = "--exp-avg-dtype", "--exp-avg-sq-dtype", "--main-params-dtype", "--main-grads-dtype"
OPTIMIZER_FLAGS = ("--optimizer", OFFLOAD, FRACTION, AWARE, FIRST, SECOND, PARAMS, GRADS)


def optimizer(g: Given) -> Iterator[Setting]:
    """The update rule; fp32 masters of bf16 weights are kept as remainders by the precision-aware optimizer."""
    if "--optimizer" in g:
        yield "optimizer.optimizer", choice(g, "--optimizer", {"adam": "adamw", "sgd": "sgd"}), "--optimizer"
    if OFFLOAD in g:
        if FRACTION in g and number(g, FRACTION) != 1:
            raise RejectedError(FRACTION, "all of the optimizer's state is offloaded, or none")
        yield "optimizer.optimizer_cpu_offload", True, OFFLOAD
    if AWARE not in g:  # without it Megatron-LM takes fp32 alone
        return
    for flag in (PARAMS, GRADS):
        choice(g, flag, {"fp32": "fp32"}, "fp32")
    first, second = (choice(g, flag, {"fp32": "fp32", "bf16": "bf16"}, "fp32") for flag in (FIRST, SECOND))
    if first != second:
        raise RejectedError(FIRST, f"both moments have one dtype: {FIRST} {first}, {SECOND} {second}")
    if first != "fp32":
        yield "optimizer.moments", first, f"{FIRST} and {SECOND}"
    if "--bf16" in g:
        yield "optimizer.masters", "remainder", AWARE
