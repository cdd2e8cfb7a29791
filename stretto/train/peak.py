"""What a device could compute at most, by its datasheet: what MFU is a share of."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

import torch

BF16_TFLOPS: Final = MappingProxyType(
    {
        "B200": 2250.0,
        "H200": 989.5,
        "H100 PCIe": 756.0,
        "H100": 989.5,
        "H800": 989.5,
        "A100": 312.0,
        "A800": 312.0,
        "L40S": 362.0,
        "L4": 121.0,
        "MI300X": 1307.4,
    }
)
"""Dense GEMMs in bf16, by a part of the device's name; the first that fits counts."""


def peak_tflops(device: torch.device, dtype: str) -> float | None:
    """Of a GPU that is known, in bf16; None for any other device or dtype. FP8 is held against bf16, as is usual."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_TFLOPS.items() if part in name), None)
