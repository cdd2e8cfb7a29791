"""Adapters that `peft` has written, as what a run begins with: the model that they are of, and A and B.

A directory with an `adapter_config.json` stands for the model that this names, with these adapters on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from stretto.arguments.sections import TargetName, is_adapter
from stretto.interop.config import LIMIT, read_json
from stretto.interop.errors import InteropError
from stretto.interop.files import DTYPES, TensorFiles
from stretto.interop.hub import located
from stretto.interop.names import Shapes
from stretto.params import Slice

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_MEANT: Final = frozenset({"base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"})
_SAID: Final = {"peft_type": "LORA", "bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
"""Fields that have one value only, or that say nothing at their usual one."""
_FREE: Final = frozenset(
    {"task_type", "inference_mode", "auto_mapping", "revision", "peft_version", "init_lora_weights", "runtime_config"}
)


@dataclass(frozen=True)
class Adapter:
    """What an `adapter_config.json` says."""

    directory: Path
    base: str
    """The model, as the file names it."""
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """The settings of fine-tuning that it stands for."""
        scale = {"lora_rank": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        return {**scale, "lora_targets": [*self.targets]}


def begun_with(name: str) -> tuple[Path, Adapter | None]:
    """The directory of the model that `--init-from` means, and the adapters on it, if any. Raises InteropError."""
    directory = located(name)
    if not (directory / CONFIG).exists():
        return directory, None
    adapter = read_adapter(directory)
    return located(adapter.base), adapter


def base_of(name: str | None) -> str | None:
    """What a run began with that was told of this name, without the adapters on it."""
    try:
        _, adapter = begun_with(name) if name is not None else (None, None)
    except InteropError:  # not there any more
        return name
    return name if adapter is None else adapter.base


def read_adapter(directory: Path) -> Adapter:
    """Raises InteropError with every field that is not supported."""
    path = directory / CONFIG
    raw = read_json(path, LIMIT)
    wrong = [
        f"{name!r} = {str(value)[:100]!r}: not supported"
        for name, value in raw.items()
        if name not in _MEANT | _FREE and value != _SAID.get(name) and value not in (None, False, 0, "", [], {})
    ]
    said: dict[str, Any] = dict.fromkeys(_MEANT) | raw
    base, rank, alpha, modules = (
        said[name] for name in ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
    )
    if raw.get("peft_type") != "LORA":
        wrong.append(f"'peft_type' = {str(raw.get('peft_type'))[:100]!r}: must be 'LORA'")
    if not isinstance(base, str) or not base:
        wrong.append("'base_model_name_or_path': must name the model that the adapters are of")
    if type(rank) is not int or not 0 < rank <= 2**14:
        wrong.append(f"'r' = {str(rank)[:100]!r}: must be a whole number above 0")
    if type(alpha) not in (int, float) or not alpha > 0:
        wrong.append(f"'lora_alpha' = {str(alpha)[:100]!r}: must be above 0")
    dropout = raw.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        wrong.append(f"'lora_dropout' = {str(dropout)[:100]!r}: must be in [0, 1)")
    known = {f"{target}_proj": target for target in get_args(TargetName)}
    if not isinstance(modules, list) or not modules or not all(isinstance(m, str) and m in known for m in modules):
        wrong.append(f"'target_modules' = {str(modules)[:100]!r}: must be a list of some of {', '.join(known)}")
    if wrong:
        raise InteropError(f"{path}: {len(wrong)} fields are not supported", wrong)
    targets = tuple(target for module, target in known.items() if module in modules)
    return Adapter(directory, str(base), int(rank), float(alpha), float(dropout), targets)


def require_adapter(adapter: Adapter, shapes: Shapes) -> None:
    """Raise InteropError where the tensors of the file are not the adapters of these names and shapes."""
    with TensorFiles(adapter.directory, single=WEIGHTS) as files:
        _require(files, shapes)


def load_adapter(adapter: Adapter, shapes: Shapes, slices: Iterable[Slice]) -> None:
    """Fill this rank's slices of the adapters, each of which every rank reads for itself: they are small."""
    with TensorFiles(adapter.directory, single=WEIGHTS) as files:
        _require(files, shapes)
        for part in slices:
            if is_adapter(part.name):
                dims = tuple(zip(part.offsets, part.tensor.shape, strict=True))
                files.read(f"{_PREFIX}{part.name}.weight", dims, part.tensor)
        files.wait()


def _require(files: TensorFiles, shapes: Shapes) -> None:
    wanted: Mapping[str, tuple[int, ...]] = {f"{_PREFIX}{name}.weight": tuple(shape) for name, shape in shapes.items()}
    wrong = [f"{name}: missing, must be {shape}" for name, shape in wanted.items() if name not in files.tensors]
    for name, held in files.tensors.items():
        if name not in wanted:
            wrong.append(f"{name}: no adapter of this model")
        elif held.shape != wanted[name] or held.dtype not in DTYPES:
            wrong.append(f"{name}: {held.shape} {held.dtype}, must be {wanted[name]} of a floating-point dtype")
    if wrong:
        raise InteropError(f"{files.directory / WEIGHTS} does not hold the adapters that {CONFIG} says", wrong[:40])
