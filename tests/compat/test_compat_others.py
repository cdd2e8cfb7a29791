"""Files of other trainers are named, and their words told in flags of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stretto.arguments.tree import settings
from stretto.cli.convert import main
from stretto.compat.others import OTHERS, of_another

pytestmark = pytest.mark.pure

FILES = {
    "torchtitan": "[training]\nlocal_batch_size = 1\n[parallelism]\ndata_parallel_shard_degree = -1\n",
    "nanotron": "tokens:\n  batch_accumulation_per_replica: 1\n  sequence_length: 256\nparallelism:\n  tp: 2\n",
    "DeepSpeed": '{"zero_optimization": {"stage": 3}, "train_batch_size": 64}',
    "a trainer of transformers": "accelerate launch run_clm.py --bf16 --per_device_train_batch_size 8 --do_train\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_trainer_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: 'there is no flag in it', to somebody who has brought what another trainer reads."""
    (tmp_path / "run").write_text(FILES[name])
    assert main(["args", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"this is of {name}, and scripts of Megatron-LM alone are converted; what it says is here:" in said.err
    trainer = next(each for each in OTHERS if each.name == name)
    words = [word for word in trainer.words if re.search(rf"\b{word}\b", FILES[name])]
    assert len(words) >= 2
    assert all(re.search(rf"^  {word} +{re.escape(trainer.words[word])}$", said.err, re.MULTILINE) for word in words)
    assert len(said.err.splitlines()) == len(words) + 2


def test_a_script_of_megatron_is_of_no_other() -> None:
    for script in (Path(__file__).parent / "scripts").glob("*.sh"):
        assert of_another(script.read_text()) is None, script


def test_every_flag_that_is_named_exists() -> None:
    ours = {f"--{path.partition('.')[2].replace('_', '-')}" for path in settings()}
    named = {flag for each in OTHERS for hint in each.words.values() for flag in re.findall(r"--[a-z0-9-]+", hint)}
    assert named <= ours | {"--preset"}
