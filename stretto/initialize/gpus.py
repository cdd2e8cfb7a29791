"""How many GPUs this process could use."""

from __future__ import annotations

from pathlib import Path


def visible_gpus() -> int:
    """As torch counts them, without beginning to use one; torch is not loaded where the machine has none."""
    drivers = (Path("/dev/kfd"), Path("/dev/dxg"))  # of AMD, of Windows
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not any(driver.exists() for driver in drivers):
        return 0
    import torch

    return torch.cuda.device_count()
