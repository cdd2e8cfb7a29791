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
from stretto.interop.export import Source, require_empty, write_tensors
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
    require_empty(to)
    to.mkdir(parents=True, exist_ok=True)
    said = [(f"base_model.model.{name}.weight", torch.float32, shape) for name, shape in adapters.items()]
    found = (
        (f"base_model.model.{name}.weight", source({name: shape})[name].float()) for name, shape in adapters.items()
    )
    write_tensors(to / "adapter_model.safetensors", said, found)
    (to / "adapter_config.json").write_text(json.dumps(_config(tuning, base), indent=2) + "\n")
    return [to / "adapter_model.safetensors"]


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
