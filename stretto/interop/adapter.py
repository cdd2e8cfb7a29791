"""Adapters by themselves, in the files of `peft`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stretto.arguments.sections import TuningConfig
from stretto.interop.config import HfConfig
from stretto.interop.errors import InteropError
from stretto.interop.export import Source, all_or_nothing, write_tensors
from stretto.interop.names import Shapes, file_tensors


def export_adapter(
    to: Path, config: HfConfig, shapes: Shapes, adapters: Shapes, tuning: TuningConfig, base: str | None, source: Source
) -> list[Path]:
    """Write adapter_config.json and adapter_model.safetensors, in fp32.

    Raises InteropError where the family stores several of our matrices as one: its modules have other names.
    """
    family = config.family.model_type
    matrices = {f"{name.rpartition('.')[0]}.weight" for name in adapters}
    theirs = {held.name for held in file_tensors(family, config.model, shapes)}
    if not adapters or matrices - theirs:
        what = f"models of {family} name or stack their matrices otherwise" if adapters else "the run has no adapters"
        raise InteropError(f"{what}: export without --adapter, which merges them", [])
    weights, config_file = to / "adapter_model.safetensors", to / "adapter_config.json"
    said = [(f"base_model.model.{name}.weight", torch.float32, shape) for name, shape in adapters.items()]
    found = (
        (f"base_model.model.{name}.weight", source({name: shape})[name].float()) for name, shape in adapters.items()
    )
    with all_or_nothing(to, weights.name, config_file.name):
        write_tensors(weights, said, found)
        config_file.write_text(json.dumps(_config(tuning, base), indent=2) + "\n")
    return [weights]


def _config(tuning: TuningConfig, base: str | None) -> Mapping[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": tuning.lora_rank,
        "lora_alpha": tuning.lora_alpha,
        "lora_dropout": tuning.lora_dropout,
        "target_modules": sorted(f"{name}_proj" for name in tuning.lora_targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
