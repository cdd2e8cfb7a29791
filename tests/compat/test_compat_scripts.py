"""Launch scripts as people write them: each becomes the run that it starts, or what is missing is named with its lines.

Those in `scripts/` are in the styles of Megatron-LM's examples, Pai-Megatron-Patch, NeMo's launcher and SLURM jobs.

Faults to catch: a flag in a variable of one line that is lost; the last branch of an if that counts; flags of srun or
of another program that are read; a file that is not there and is passed over; a default of ours for what a script says.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from stretto.cli.convert import main
from stretto.compat.megatron import script_of

pytestmark = pytest.mark.pure

SCRIPTS = Path(__file__).parent / "scripts"
SIZES = "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --micro-batch-size 4"
RUN = f"{SIZES} --global-batch-size 64 --attention-dropout 0 --lr 1e-4 --train-iters 100"

PAI = "dsw 7B 1 32 1e-5 2048 bf16 4 sel true 1000000"
CONVERTED: dict[tuple[str, str], dict[str, object]] = {
    ("examples_gpt3.sh", "ckpt logs vocab text"): {
        "layers": 24, "hidden": 2048, "tp": 8, "global_batch": 2, "decay_steps": 430000, "out": "ckpt",
    },
    ("examples_llama_fp8.sh", ""): {
        "ffn": 14336, "kv_heads": 8, "rope_base": 1e6, "fp8": "tensorwise", "held_out": 0.01, "vocab": 128256,
    },
    ("pai_qwen.sh", PAI): {
        "layers": 28, "ffn": 18944, "kv_heads": 4, "tp": 4, "sequence_parallel": True, "recompute": "selective",
        "steps": 15, "out": "out/pretrain-qwen-7B-lr-1e-5-bs-1",
    },
    ("pai_qwen.sh", PAI.replace("7B", "72B")): {"layers": 80, "hidden": 8192, "kv_heads": 8},
    ("slurm_multinode.sh", ""): {"tp": 4, "pp": 2, "global_batch": 32, "lr": 3e-4},
    ("slurm_multinode.sh", "--set TP=8"): {"tp": 8, "pp": 2, "global_batch": 16},
    ("sourced.sh", ""): {"layers": 24, "hidden": 1024, "micro_batch": 4, "global_batch": 16},
    ("table_of_sizes.sh", ""): {"layers": 24, "heads": 16, "bias": False, "steps": 5000, "global_batch": 32},
    ("table_of_sizes.sh", "--set SIZE=6.7B --set DRY_RUN=1"): {"layers": 32, "heads": 32, "steps": 1},
    ("options_loop.sh", ""): {"layers": 12, "global_batch": 8, "log_every": 100},
    ("options_loop.sh", "-- --layers=24 --debug"): {"layers": 24, "log_every": 1},
    ("usage.sh", "text out"): {"out": "out", "global_batch": 8},
    ("heredoc.sh", ""): {"layers": 16, "lr": 1e-4, "global_batch": 32, "held_out": 0.0, "eval_every": 0},
    ("depends_on_cluster.sh", "--set DEPTH=6 --set MICRO=2 --set EXTRA="): {"layers": 6, "micro_batch": 2},
}  # fmt: skip
REJECTED: dict[tuple[str, str], tuple[str, ...]] = {
    ("examples_gpt3.sh", ""): (
        "--save: $1 (line 12): is an argument of the script, to be said after its name: say --set CHECKPOINT_PATH=",
        "--data-path: $4 (line 15)",
    ),
    ("pai_qwen.sh", PAI.replace("bf16", "fp16")): ("--fp16: fp16 with loss scaling is not available",),
    ("pai_qwen.sh", PAI.replace("7B", "3B")): ("${NUM_LAYERS} (line 87): is not set in the script",),
    ("slurm_run_cmd.sh", ""): ("--squared-relu: the activations are",),
    ("nemo_launcher.sh", ""): ("no command in it trains: none runs a .py with Megatron-LM's flags",),
    ("depends_on_cluster.sh", ""): (
        "--num-layers: $DEPTH (line 10): is not set in the script: say --set DEPTH=VALUE",
        "$MICRO (line 3): lines 3 to 8 set it under a condition that is not known: [ -d /lustre/fast ] asks for a file",
        "$EXTRA (line 3)",
    ),
    ("two_runs.sh", ""): ("line 4 trains more than once, with other flags each time",),
    ("usage.sh", ""): ("it ends in line 4 before it trains, where its arguments are taken for unset",),
}


def converted(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["args", *words]) == 0, capsys.readouterr().err
    return {name: value for body in tomllib.loads(capsys.readouterr().out).values() for name, value in body.items()}


@pytest.mark.parametrize(("script", "words"), CONVERTED)
def test_a_script_becomes_the_run_that_it_starts(capsys: pytest.CaptureFixture[str], script: str, words: str) -> None:
    assert CONVERTED[script, words].items() <= converted(capsys, str(SCRIPTS / script), *words.split()).items()


@pytest.mark.parametrize(("script", "words"), REJECTED)
def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], script: str, words: str) -> None:
    assert main(["args", str(SCRIPTS / script), *words.split()]) == 2
    heard = capsys.readouterr().err
    for problem in REJECTED[script, words]:
        assert problem in heard
    assert not any(ord(c) >= 0xF0000 for c in heard)


def flags(text: str) -> dict[str, list[str]]:
    script = script_of(text)
    assert not script.problems, [str(p) for p in script.problems]
    return {flag: values for flag, *values in script.flags}


def problems(text: str) -> str:
    return "\n".join(map(str, script_of(text).problems))


def test_flags_of_launchers_and_of_other_programs_are_theirs() -> None:
    said = flags(
        "python make_mixture.py --split valid --num-workers 3\n"
        "srun -n 2 --container-image=x.sqsh nsys profile -o out torchrun --nproc_per_node 8 --max-restarts 0 "
        f"pretrain_gpt.py {RUN}\npython tools/report.py --hidden-size 3\n"
    )
    assert list(said) == [word for word in RUN.split() if word.startswith("--")]
    assert script_of(f"torchrun --nnodes=2 --nproc-per-node 4 pretrain_gpt.py {RUN}").processes == 8
    assert script_of(f"mpirun -np 16 python pretrain_gpt.py {RUN}").processes == 16
    assert script_of(f"torchrun --nproc_per_node gpu pretrain_gpt.py {RUN}").processes is None
    assert script_of(f"python -m torch.distributed.run --nproc_per_node 4 -m my.pretrain {RUN}").processes == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no flag in it"),
        ("model:\n  num_layers: 12\n", "there is no flag in it"),
        (f"torchrun pretrain_gpt.py {RUN} --lr $LR", "--lr: $LR (line 1): is not set in the script"),
        (f"torchrun pretrain_gpt.py {RUN} --save `date`", "--save: `date` (line 1): is the output of a command"),
        (f"torchrun pretrain_gpt.py {RUN} --save ~/x", "~ (line 1): is the home of whoever runs the script"),
        (f"torchrun pretrain_gpt.py {RUN} --save x/*.y", "x/*.y (line 1): stands for names of files"),
        (f"torchrun pretrain_gpt.py {RUN} --seed $RANDOM", "--seed: $RANDOM (line 1)"),
        (f"read SEED\ntorchrun pretrain_gpt.py {RUN} --seed $SEED", "$SEED (line 1): is what read reads"),
        (f"source gone.sh\ntorchrun pretrain_gpt.py {RUN}", "line 1: gone.sh is not here, and may set anything"),
        (f'torchrun pretrain_gpt.py "--lr 3" {RUN}', "'--lr 3' is one word"),
        (f"torchrun pretrain_gpt.py run.yaml {RUN}", "'run.yaml' stands before the first flag"),
        (f"$LAUNCH {RUN}", "line 1: which program trains is not known: $LAUNCH"),
        ("bash gone.sh --num-layers 3", "gone.sh, which line 1 starts, is not here"),
        (f"while true; do X=1; done\ntorchrun pretrain_gpt.py {RUN}", "more than 100000 commands"),
        (f"f() {{ f; }}\nf\ntorchrun pretrain_gpt.py {RUN}", "call each other more than"),
        ('A="x', 'line 1: a " that is not closed'),
        ("if true; then\n", "'fi' is missing"),
        ("$((1/0))", "cannot be followed"),
        ("X[" + "$aaaaaaaaaa" * 40, "there is no flag in it"),  # no regular expression that backtracks for ever
        ("case 7 in [9-1]) ;; [6--9]) ;; [\u00b2-5]) ;; esac; shift \u00b2", "there is no flag in it"),
        ("for x in a (b); do :; done", "not expected in the words of a loop"),
        ('L=a; while true; do L="$L$L"; L="${L:0:9999}"; done', "more than 100000 commands"),
        ("(" * 3000, "nested"),
        ("$(" * 3000, "nested"),
        ("A=x; " + "A=$A$A; " * 60, "grows beyond"),
        (f"torchrun pretrain_gpt.py {RUN}\ntorchrun pretrain_t5.py {RUN} --seed 1", "both train"),
        (f"if [ $X = 1 ]; then\n S=1\nelse\n S=2\nfi\ntorchrun pretrain_gpt.py {RUN} --seed $S", "lines 1 to 5 set it"),
    ],
)
def test_what_cannot_be_followed_is_said(text: str, problem: str) -> None:
    assert problem in problems(text)


def test_options_stand_anywhere_and_a_file_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, out = tmp_path / "run.sh", tmp_path / "run.toml"
    script.write_text(f"torchrun pretrain_gpt.py {RUN}")
    for words in (["--out", str(out), str(script)], [str(script), "--out", str(out)], ["--partial", str(script)]):
        assert main(["args", *words]) == 0
    assert main(["--partial", "args", str(script)]) == 0
    capsys.readouterr()
    for words in (
        [str(script), "--out", str(tmp_path / "nowhere" / "x")],
        [str(tmp_path)],
        [str(script), "--set", "3"],
    ):
        assert main(["args", *words]) == 2
        assert "stretto convert: " in capsys.readouterr().err
