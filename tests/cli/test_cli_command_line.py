"""One style for every command: help, everything that is wrong at once, and what a shell completes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import shtab

from stretto.cli import COMMANDS, main
from stretto.cli.completion import parser

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "layout --tpp 3 --pp x",
            ["--tpp is no flag; did you mean --tp?", "--pp: 'x' is text, must be a whole number"],
        ),
        ("sample --tokens 0", ["--prompt is missing: --prompt TEXT", "must be >= 1"]),
        ("export --checkpoint a --to b c", ["'c' stands alone: options are given as --name value"]),
        ("schedule", ["WHAT is missing: list|draw|check|simulate|search"]),
        ("schedule drow", ["'drow' is none of list, draw", "did you mean draw?"]),
        ("checkpoint lst", ["stretto checkpoint: no command 'lst'; did you mean list?"]),
        ("checkpoint prune", ["DIRECTORY is missing", "--keep is missing: --keep N"]),
        ("checkpoint diff a b c", ["'c' stands alone"]),
        ("convert arg", ["'arg' is none of args; did you mean args?"]),
        ("launch slurm --node 2", ["--node is no flag; did you mean --nodes?"]),
        ("launch", ["usage: stretto launch COMMAND"]),
        ("data build --workers 0 --tp x", ["--workers: 0 is out of range, must be >= 1", "'x' is text"]),
        (
            "explain --hbm -3 --tied=2",
            ["--hbm: -3.0 is out of range, must be > 0", "'2' is text, must be true or false"],
        ),
        ("completion", ["SHELL is missing: bash|zsh|fish"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(words: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a command that stops at its first mistake, or says it on standard output or as a traceback."""
    try:
        code = main(words.split())
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    assert (code, told.out) == (2, "")
    assert [each for each in said if each not in told.err] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_verb_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a command whose help is in another style, or loads torch."""
    verbs = {"checkpoint": "list show verify diff prune", "launch": "local slurm k8s", "data": "build inspect"}
    for words in ([command], *([command, verb] for verb in verbs.get(command, "").split())):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        told = capsys.readouterr()
        assert (ended.value.code, told.err) == (0, "")
        assert told.out.startswith(f"usage: stretto {' '.join(words)}")


def test_lists_take_words_one_after_another_or_one_flag_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: options of sbatch that are cut at a comma, or of which the last one alone is kept."""
    for words in (["--sbatch", "constraint=a,b", "--sbatch", "mem=0"], ["--sbatch", "constraint=a,b", "mem=0"]):
        assert main(["launch", "slurm", *words, "--", "--device", "cpu", "--tp", "2"]) == 0
        told = capsys.readouterr().out
        assert "#SBATCH --constraint=a,b\n" in told
        assert "#SBATCH --mem=0\n" in told


def test_a_settings_file_may_stand_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Catches: a file that only `explain` takes without --config, and a word that is taken for one."""
    from stretto.cli.words import parse_or_demo

    file = tmp_path_factory.mktemp("run") / "run.toml"
    file.write_text("[model]\nlayers = 6\n")
    assert parse_or_demo(["--heads", "4", str(file)], env={}, files=False).args.model.layers == 6


COMPLETED = {
    "stretto che": ["checkpoint"],
    "stretto checkpoint pr": ["prune"],
    "stretto train --sharding z": ["zero1", "zero2"],
    "stretto train --tp-com": ["--tp-comm-overlap"],
    "stretto train --preset qwen3-": ["qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b"],
    "stretto verify --agai": ["--against"],
    "stretto checkpoint prune --keep-": ["--keep-every"],
    "stretto schedule sim": ["simulate"],
    "stretto sample --device cu": ["cuda"],
    "stretto train --config ru": ["run.toml"],
}


def test_bash_completes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a real bash. Catches: a command, flag or choice that the script does not know."""
    folder = tmp_path_factory.mktemp("bash")
    written = subprocess.run(
        [sys.executable, "-m", "stretto", "completion", "bash"], capture_output=True, text=True, check=True
    )
    (folder / "completion.bash").write_text(written.stdout)
    (folder / "run.toml").touch()
    ask = ["source completion.bash", "run=$(complete -p stretto); run=${run##*-F }; run=${run%% *}"]
    for line in COMPLETED:
        words = line.split()
        quoted = " ".join(f"'{word}'" for word in words)
        ask += [f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; COMPREPLY=()", '"$run"']
        ask += ['echo "${COMPREPLY[*]}"']
    answered = subprocess.run(
        ["bash", "--norc"], input="\n".join(ask), cwd=folder, capture_output=True, text=True, check=True
    )
    found = [sorted(line.split()) for line in answered.stdout.splitlines()]
    assert dict(zip(COMPLETED, found, strict=True)) == {line: sorted(words) for line, words in COMPLETED.items()}


def test_completion_knows_every_command_of_every_shell() -> None:
    """Catches: a command without a form."""
    made = parser()
    for shell in ("zsh", "fish"):
        script = shtab.complete(made, shell)
        assert [name for name in COMMANDS if name not in script] == []
        assert "prune" in script
        assert "sharding" in script


def test_an_error_of_a_store_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a page of a client's frames for a wrong endpoint."""

    class NoEndpointError(Exception):
        pass

    def listed(_: object) -> int:
        raise NoEndpointError("Could not connect")

    monkeypatch.setattr("stretto.cli.checkpoint.main", listed)
    with pytest.raises(NoEndpointError):  # of nobody knows whom: it is shown
        main(["checkpoint", "list", "s3://bucket/run"])
    monkeypatch.setattr(NoEndpointError, "__module__", "botocore.exceptions")
    assert main(["checkpoint", "list", "s3://bucket/run"]) == 2
    assert capsys.readouterr().err == "stretto checkpoint: NoEndpointError: Could not connect\n"
