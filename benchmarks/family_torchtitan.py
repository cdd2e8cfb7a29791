"""Published models in torchtitan's trainer: its Qwen3 and its Llama 3, with the weights of a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.train.peers import RunRejectedError
from benchmarks.train.peers.torchtitan_trainer import Torchtitan, ffn_args, need_gpu
from benchmarks.train.shapes import Job
from stretto.arguments import parse
from stretto.arguments.schema import ModelConfig
from stretto.interop.config import read_config


@dataclass(frozen=True)
class Known:
    """A family of torchtitan: its arguments say `said` of a model, and all else is as our preset has it."""

    name: str
    preset: str
    said: frozenset[str]


SIZES = frozenset({"layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "norm_eps", "rope_base"})
OURS = frozenset({"tied", "init_std"})
"""A tied Llama is made here; initial weights are read."""
SCALING = frozenset({"rope_factor", "rope_original_positions", "rope_low_freq", "rope_high_freq"})
QWEN3 = Known("Qwen3", "qwen3-0.6b", SIZES | OURS)
LLAMA3 = Known("Llama 3", "llama3.2-1b", SIZES | OURS | SCALING | {"rope_scaling"})


def known(model: ModelConfig) -> Known:
    """The family that can be this model. Raises RunRejectedError with what it lacks, by the names of our settings."""
    family = QWEN3 if model.qk_norm else LLAMA3
    like = parse(["--preset", family.preset], env={}, files=False).args.model
    apart = {f.name: getattr(model, f.name) for f in fields(model) if f.name not in family.said}
    apart = {name: value for name, value in apart.items() if value != getattr(like, name)}
    if family is LLAMA3 and model.rope_scaling not in ("none", "llama3"):
        apart["rope_scaling"] = model.rope_scaling
    if family is LLAMA3 and model.heads * (model.head_dim or 0) not in (0, model.hidden):
        apart["head_dim"] = model.head_dim
    if apart:
        said = ", ".join(f"{name} = {value}" for name, value in apart.items())
        raise RunRejectedError(f"its dense {family.name} lacks {said}")
    return family


class FamilyTorchtitan(Torchtitan):
    """The model of a directory, on one GPU: fp32 weights under autocast, as torchtitan has it, nothing recomputed."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def setup(self, job: Job) -> None:
        """Raises RunRejectedError where torchtitan has no such model."""
        model = read_config(self.directory).model
        family = known(model)
        need_gpu(job)
        spec, args = _qwen3(model) if family is QWEN3 else _llama3(model)
        self.start(replace(job, words=""), spec, args)
        self._load(spec.state_dict_adapter(args, None))

    def _load(self, adapter: Any) -> None:
        """Weights of the files into those that are trained: every one, and no other."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        files = {name: t for path in self.directory.glob("*.safetensors") for name, t in load_file(path).items()}
        trained = self.trainer.model_parts[0]
        counts = [sum(t.numel() for t in each) for each in (trained.parameters(), files.values())]
        if counts[0] != counts[1]:  # a head of its own is the same model until the first update
            raise RuntimeError(f"torchtitan trains {counts[0]:,} parameters, the files hold {counts[1]:,}")
        found = adapter.from_hf(files)
        found.setdefault("output.weight", found["tok_embeddings.weight"])
        set_model_state_dict(trained, found)


def _sizes(model: ModelConfig) -> dict[str, Any]:
    return {
        "dim": model.hidden,
        "n_layers": model.layers,
        "n_heads": model.heads,
        "n_kv_heads": model.kv_heads or model.heads,
        "vocab_size": model.vocab,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
    }


def _qwen3(model: ModelConfig) -> tuple[Any, Any]:
    """Its TrainSpec and the model's arguments."""
    from torchtitan.models.qwen3 import Qwen3ModelArgs, get_train_spec

    args = Qwen3ModelArgs(
        **_sizes(model),
        head_dim=model.head_dim or model.hidden // model.heads,
        hidden_dim=model.ffn,
        enable_weight_tying=model.tied,
    )
    return get_train_spec(), args


def _llama3(model: ModelConfig) -> tuple[Any, Any]:
    """Its TrainSpec and the model's arguments. Its rotation is always scaled: by 1 where ours is not."""
    from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
    from torchtitan.models.llama3.model.args import RoPEScalingArgs

    scaling = RoPEScalingArgs(scaling_factor=1.0)
    if model.rope_scaling == "llama3":
        scaling = RoPEScalingArgs(
            scaling_factor=model.rope_factor,
            low_freq_factor=model.rope_low_freq,
            high_freq_factor=model.rope_high_freq,
            original_max_position_embeddings=model.rope_original_positions or 8192,
        )
    args = TransformerModelArgs(**_sizes(model), rope_scaling_args=scaling, **ffn_args(model.hidden, model.ffn))
    spec = get_train_spec()
    return replace(spec, model_cls=_tied(spec.model_cls)) if model.tied else spec, args


def _tied(model_class: Any) -> Any:
    """Its Llama with the embedding as head, tied as its Qwen3 is: at first, and again once storage is there."""

    class Tied(model_class):  # type: ignore[misc]
        def __init__(self, model_args: Any) -> None:
            super().__init__(model_args)
            self.output.weight = self.tok_embeddings.weight

        def init_weights(self, buffer_device: Any = None) -> None:
            self.output.weight = self.tok_embeddings.weight
            super().init_weights(buffer_device)

    return Tied
