"""Settings of what is saved, and of where a run begins."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.setting import setting


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go, how often, and whether to go on from one."""

    out: str = setting(
        "runs/latest", "directory of the run: checkpoints, metrics, resolved.toml", carried=False, path=True
    )
    save_every: int = setting(0, "save a checkpoint every so many steps; 0: at the end only", unit="steps", at_least=0)
    save: bool = setting(
        True, "write checkpoints; without, the run leaves its metrics alone, and nothing goes on from it", carried=False
    )
    async_save: bool = setting(
        True, "a process of its own writes checkpoints while training goes on; else training waits", carried=False
    )
    keep: int = setting(2, "so many newest checkpoints stay", at_least=1)
    keep_every: int = setting(
        0, "besides them, each checkpoint whose step is a multiple of this stays; 0: none", unit="steps", at_least=0
    )
    checkpoint_dir: str | None = setting(
        None,
        "where checkpoints go, also a URL such as s3://bucket/run; unset: the directory checkpoints in that of the run",
        carried=False,
        path=True,
    )
    init_from: str | None = setting(
        None,
        "directory of a Hugging Face model, or its name in the cache of downloads: the run begins with its shape, "
        "weights and tokenizer",
    )
    export_hf: str | None = setting(
        None,
        "directory that gets the model as a Hugging Face one when the run has made its last step",
        carried=False,
        path=True,
    )
    resume: bool = setting(
        False, "go on from the newest complete checkpoint in the directory of the run", carried=False
    )
    auto_resume: bool = setting(False, "like resume, but begin anew where there is no checkpoint yet", carried=False)
