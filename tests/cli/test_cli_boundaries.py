"""What comes from outside ends in a sentence: words, files, environments and terminals, of people and of attackers."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stretto.arguments import ConfigError, Record, parse
from stretto.arguments.command_line import flags
from stretto.arguments.tree import settings as all_settings
from stretto.checkpoint import save
from stretto.cli import main
from stretto.params import Slice
from stretto.train.learning_rate import changed_rate
from stretto.world import World

pytestmark = pytest.mark.gloo

ESCAPE = "\x1b]0;owned\x07\x1b[31m"


@contextmanager
def spoken(encoding: str = "utf-8") -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Standard output and error as strict streams of this encoding; what was written to them."""
    before, written = (sys.stdout, sys.stderr), (io.BytesIO(), io.BytesIO())
    sys.stdout, sys.stderr = (io.TextIOWrapper(each, encoding=encoding, write_through=True) for each in written)
    try:
        yield written
    finally:
        sys.stdout, sys.stderr = before


def answer(words: list[str], encoding: str = "utf-8") -> tuple[int, str, str]:
    """Exit code, output and errors of a command; no exception but an exit may leave it."""
    with spoken(encoding) as (out, err):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 2
        said = [each.getvalue().decode(encoding) for each in (out, err)]
    return code, said[0], said[1]


def rejected(words: list[str]) -> str:
    """The sentence in which a command ends within a second of this process's time."""
    gc.freeze()  # what earlier tests have left is not gone through for this one
    begin = time.thread_time()
    code, out, err = answer(words)
    taken = time.thread_time() - begin
    gc.unfreeze()
    assert (code, out) == (2, ""), (code, out[-500:], err[-500:])
    assert taken < 1
    assert len(err) < 6000
    assert not set(err) & set(ESCAPE[:1] + ESCAPE[-5:-4])
    assert "Traceback" not in err
    return err


# --- files of settings ---

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
FILES: dict[str, tuple[str, bytes]] = {
    "an alias bomb": ("x.yaml", BOMB.encode()),
    "deep YAML": ("x.yaml", b"model: " + b"[" * 50_000),
    "deep YAML blocks": ("x.yaml", b"".join(b" " * i + b"a:\n" for i in range(400))),
    "deep TOML": ("x.toml", b"[model]\nlayers = " + b"[" * 50_000),
    "deep TOML tables": ("x.toml", b"[model]\nlayers" + b".a" * 30_000 + b" = 1"),
    "a number of a million digits": ("x.toml", b"[run]\nsteps = 0x" + b"f" * 100_000),
    "2^64": ("x.toml", b"[run]\nseed = 18446744073709551616"),
    "no UTF-8": ("x.toml", b"[data]\ndata = '\xff'"),
    "a NUL": ("x.yaml", b'data:\n  data: "a\\0b"'),
    "a name that steers": ("x.yaml", b'data:\n  tokenizer: "\\e]0;owned\\a\\e[31m"\n"\\e[2J": 1'),
    "markup": ("x.toml", b"[data]\ntokenizer = '[/x] [link=file:///etc]'"),
    "too large": ("x.toml", b"#" * 200_000),
    "20,000 unknown keys": ("x.toml", b"".join(b"a%d = 1\n" % i for i in range(8_000))),
}


@pytest.mark.parametrize("what", FILES)
def test_a_hostile_file_of_settings_is_a_sentence(tmp_path: Path, what: str) -> None:
    """Catches: RecursionError, memory for a page of aliases, control characters and markup that reach the terminal."""
    name, content = FILES[what]
    (tmp_path / name).write_bytes(content)
    rejected(["explain", "--config", str(tmp_path / name)])


SIZES = [s.path for s in all_settings().values() if s.kind is int and s.section in ("model", "parallel", "batch")]


@pytest.mark.parametrize("path", [*SIZES, "run.nproc", "run.sample_tokens"])
def test_a_size_of_a_billion_is_refused_before_memory_is_taken(tmp_path: Path, path: str) -> None:
    section, _, name = path.partition(".")
    (tmp_path / "x.toml").write_text(f"[{section}]\n{name} = 1_000_000_000\n")
    if path != "parallel.gpus_per_node":  # a number of which nothing is made
        rejected(["explain", "--config", str(tmp_path / "x.toml")])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.toml")
    assert "not a regular file" in rejected(["explain", "--config", str(tmp_path / "x.toml")])
    os.mkfifo(tmp_path / "tokenizer.json")
    assert "no file" in rejected(
        ["train", "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path / "r")]
    )


@pytest.mark.parametrize(("name", "text"), [("x.toml", "[model]\nlayers = 7\n"), ("x.yaml", "model:\n  layers: 7\n")])
def test_a_byte_order_mark_is_skipped(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert parse(["--config", str(tmp_path / name)], env={}).args.model.layers == 7


def word_piece(**ids: int) -> str:
    """A tokenizer.json of a few words, without the unknown token that it says it has."""
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 9,
    }
    end = {"id": 1, "content": "</s>", "special": True} | dict.fromkeys(["single_word", "lstrip", "rstrip"], False)
    added, vocab = [{**end, "normalized": False}], {"</s>": 1, **ids}
    others = dict.fromkeys(["truncation", "padding", "normalizer", "post_processor", "decoder"])
    pre = {"type": "Whitespace"}
    return json.dumps(
        {"version": "1.0", "added_tokens": added, "pre_tokenizer": pre, "model": {**model, "vocab": vocab}, **others}
    )


def test_a_tokenizer_without_its_unknown_token_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(word_piece(the=0))
    (texts := tmp_path / "texts").mkdir()
    for name in "abcd":
        (texts / f"{name}.txt").write_text(f"the end of all {name}\n" * 9)
    where = ["--data", str(texts), "--held-out", "0.5", "--cache", str(tmp_path / "c")]
    assert "[UNK]" in rejected(["data", "build", *where, "--tokenizer", str(tmp_path)])


@pytest.mark.parametrize("number", [10**9, 60_000_000, 2**31])
def test_a_tokenizer_with_ids_of_a_billion_is_a_sentence(tmp_path: Path, number: int) -> None:
    (tmp_path / "tokenizer.json").write_text(word_piece(the=number))
    assert f"{number:,}" in rejected(["explain", "--tokenizer", str(tmp_path)])


@pytest.mark.parametrize("text", ["[" * 50_000, '{"eos_token": ' + "[" * 9_000, "\ufeff{}", "3"])
def test_a_damaged_tokenizer_config_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(word_piece(the=0))
    (tmp_path / "tokenizer_config.json").write_text(text)
    code, _, err = answer(["explain", "--tokenizer", str(tmp_path)])
    assert code == (0 if text.endswith("{}") else 2), err
    assert "Traceback" not in err


# --- words ---


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", str(2**64)],
        ["--out", "x" * 300],
        ["--data", "x" * 300],
        ["--tokenizer", "x" * 300],
        ["--cache", "/dev/null/x"],
        ["--log-dir", "/dev/null/x"],
        ["--sample-prompt", "\udcff"],
        ["--out", "~nobody-of-this-name/x"],
        ["--data", ""],
        ["--checkpoint-dir", __file__],
    ],
)
def test_words_that_no_system_takes_are_refused_before_anything_runs(words: list[str]) -> None:
    """Catches, among others: "$TEXTS" where nobody has set it, which would train on whatever lies in this directory."""
    rejected(["train", "--preset", "tiny", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layout", "--tp", "99999999999"], "99,999,999,999 ranks, must be <= 1,048,576"),
        (["layout", "--tp", "2", "--gpus-per-node", "0"], "0 is out of range, must be >= 1"),
        (["explain", "--preset", "demo", "--vocab", "10"], "model.vocab=10, but the tokenizer 'python' has 4096"),
        (["launch", "slurm", "--preset", "tiny"], "--preset is a setting of the run, which follow after --"),
        (["launch", "k8s", "--nodes", "2", "--tp=2"], "launch k8s ... -- --tp ..."),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(words: list[str], message: str) -> None:
    """Catches: all peers of 10^11 ranks in memory, and an explanation of a run that `stretto train` rejects."""
    code, _, err = answer(words)
    assert (code, message in err, err.count("Traceback")) == (2, True, 0), err


def test_an_output_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "nowhere" in answer(["layout", "--tp", "2", "--out", str(tmp_path / "nowhere/x.svg")])[2]
    assert "nowhere" in rejected(["verify", "--preset", "tiny", "--json", str(tmp_path / "nowhere/x.json")])
    slurm = ["launch", "slurm", "--out", str(tmp_path / "nowhere/x.sh"), "--", "--preset", "tiny"]
    assert "nowhere" in rejected(slurm)


# --- terminals ---


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "words",
    [["explain", "--preset", "demo", "--data", "/ä→[bold]"], ["layout", "--tp", "2", "--dp", "2"], ["--help"]],
)
def test_every_terminal_is_spoken_to(monkeypatch: pytest.MonkeyPatch, words: list[str], encoding: str) -> None:
    for columns in ("0", "-1", "²", "9" * 9, "80"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("LINES", columns)
        code, out, _ = answer(words, encoding)
        assert code == 0
        assert max(map(len, out.splitlines())) < 2000


# --- records of checkpoints ---


def checkpoint(directory: Path, extra: dict[str, Any]) -> Path:
    return save(directory, 1, [Slice("model/w", torch.ones(2), (2,), (0,), True)], extra, World.single())


def recorded(**changes: Any) -> dict[str, Any]:
    """The record of a run of the preset `tiny`, with settings changed: `model__layers=3`."""
    record = parse(["--preset", "tiny", "--vocab", "257"], env={}).record().as_dict()
    for path, value in changes.items():
        section, _, name = path.partition("__")
        record["arguments"][section][name] = value
    return {"record": record, "step": 1}


deep: list[Any] = []
for _ in range(500):
    deep = [deep]

EXTRAS: dict[str, Callable[[], dict[str, Any]]] = {
    "no record": dict,
    "a record that is a list": lambda: {"record": [1, 2], "step": 1},
    "arguments that are text": lambda: {"record": {"arguments": ESCAPE, "derived": 3}, "step": 1},
    "sections that are numbers": lambda: {"record": {"arguments": {"model": 3}}, "step": 1},
    "a step that is text": lambda: recorded() | {"step": ESCAPE},
    "an unknown setting that steers": lambda: recorded(**{f"model__{ESCAPE}": 1}),
    "a value that steers": lambda: recorded(model__activation=ESCAPE),
    "a billion layers": lambda: recorded(model__layers=10**9),
    "the largest model there may be": lambda: recorded(model__layers=2**14, model__hidden=2**20, model__ffn=2**24),
    "a billion sequences": lambda: recorded(batch__global_batch=10**9),
    "deep lists": lambda: recorded(parallel__stage_layers=deep),
    "a NUL in a name": lambda: recorded(data__tokenizer="a\0b"),
    "a tokenizer that is not there": lambda: recorded(data__tokenizer="/" + ESCAPE),
}


@pytest.mark.parametrize("what", EXTRAS)
def test_a_hostile_record_is_a_sentence(tmp_path: Path, what: str) -> None:
    """Catches: a record that is indexed or shown as it stands, and a model that is made before its size is seen."""
    run = tmp_path / "run"
    checkpoint(run / "checkpoints", EXTRAS[what]())
    rejected(["sample", "--checkpoint", str(run), "--prompt", "a"])
    if what != "a tokenizer that is not there":
        err = rejected(["train", "--resume", "--out", str(run), "--data", __file__, "--cache", str(tmp_path / "c")])
        assert (tmp_path / "run" / "resolved.toml").exists() is False, err


def test_explain_goes_by_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: --resume that is taken and forgotten, so that another run is explained than the one that goes on."""
    checkpoint(tmp_path / "run" / "checkpoints", recorded(model__ffn=192))
    code, out, _ = answer(["explain", "--resume", "--out", str(tmp_path / "run"), "--lr", "0.25"])
    assert code == 0
    assert f"from step 1, {tmp_path / 'run'}" in out.replace("\n", "")
    assert re.search(r"changed .*optimizer\.lr \S+ is now 0\.25", out)
    assert re.search(r"model\.ffn +192 +checkpoint", out)
    assert "model.ffn was 192" in rejected(["explain", "--resume", "--out", str(tmp_path / "run"), "--ffn", "128"])
    assert "no complete checkpoint" in rejected(["explain", "--resume", "--out", str(tmp_path / "other")])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "latest")
    (tmp_path / "runs").mkdir()
    (tmp_path / "latest").rename(tmp_path / "runs/latest")
    assert "runs/latest" in rejected(["sample", "--prompt", "a"]), "where a run goes unless it is told"


def test_sample_suggests_what_it_takes_and_asks_for_the_tokenizer_of_the_run(tmp_path: Path) -> None:
    """Catches: ids of one tokenizer read as those of another; suggestions of another model; a CUDA call's traceback."""
    extra = recorded(model__vocab=4096) | {"feed": {"tokenizer": "byte"}}
    words = ["sample", "--checkpoint", str(checkpoint(tmp_path, extra)), "--prompt", "a"]
    assert "trained with another tokenizer than python" in rejected([*words, "--tokenizer", "python"])
    said = rejected([*words, "--tp", "5"])
    assert "heads % tp" in said
    assert "or take one process" in said
    assert "--heads" not in said
    if not torch.cuda.is_available():
        assert "sees no CUDA device" in rejected([*words, "--device", "cuda"])


def test_sample_compares_checksums(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, recorded())
    extra = (path / "extra.json").read_text()
    (path / "extra.json").write_text(extra.replace("tiny", "tinz").replace('"layers": 3', '"layers": 2'))
    assert "SHA-256 differs" in rejected(["sample", "--checkpoint", str(path), "--prompt", "a"])


def test_a_record_never_says_where_a_run_writes() -> None:
    """Catches: a setting that names a place to write and is carried over."""
    evil = "/tmp/evil"
    paths = [s.path for s in all_settings().values() if s.is_path]
    record = Record.of((first := parse([], env={}, files=False)).args, first.sources).as_dict()
    for path in paths:
        section, _, name = path.partition(".")
        record["arguments"][section][name] = evil
    args = parse([], env={}, files=False, checkpoint=Record.from_dict(record, "x")).args
    assert evil in (args.data.data, args.data.tokenizer)  # what is read comes from there
    assert evil not in (args.data.cache, args.checkpoint.out, args.checkpoint.export_hf, args.run.log_dir)
    assert evil != args.checkpoint.checkpoint_dir
    assert evil != args.parallel.schedule_costs
    assert set(paths) == {
        "data.data",
        "data.eval_data",
        "data.tokenizer",
        "data.cache",
        "checkpoint.checkpoint_dir",
        "checkpoint.export_hf",
        "checkpoint.out",
        "parallel.schedule_costs",
        "run.log_dir",
    }


def test_relative_names_are_understood_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    record = json.loads(json.dumps(parse(["--data", "a.txt"], env={}).record().as_dict()))
    assert record["given"] == {"data.data": "a.txt"}
    monkeypatch.chdir("/")
    again = parse([], env={}, checkpoint=Record.from_dict(record, "x"))
    assert again.args.data.data == str(tmp_path / "a.txt")
    assert again.args.data.tokenizer == "byte"


def test_each_of_several_corpora_is_understood_in_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a list of corpora taken for one name; validation sets that stay relative; a list that is too long."""
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    many = ",".join(["./" * i + "c.txt" for i in range(1, 30)])
    words = ["--data", "a.txt:0.7,b.txt:.3", "--eval-data", "x=c.txt,y=" + str(tmp_path / "a.txt")]
    record = json.loads(json.dumps(parse(words, env={}).record().as_dict()))
    data = record["arguments"]["data"]
    assert data["data"] == f"{tmp_path}/a.txt:0.7,{tmp_path}/b.txt:.3"
    assert data["eval_data"] == f"x={tmp_path}/c.txt,y={tmp_path}/a.txt"
    assert record["given"] == {"data.data": words[1], "data.eval_data": words[3]}
    monkeypatch.chdir("/")
    again = parse([], env={}, checkpoint=Record.from_dict(record, "x"))
    assert (again.args.data.data, again.args.data.eval_data) == (data["data"], data["eval_data"])
    monkeypatch.chdir(tmp_path)
    assert len(many) > 255
    assert parse(["--data", many], env={}).args.data.data == many


def test_a_changed_schedule_is_told_with_both_rates() -> None:
    """8 steps, then 16: the rate of step 9 was the floor, and is in the middle of the decay."""
    base = ["--lr", "1e-3", "--min-lr", "1e-4", "--warmup-steps", "0"]
    old, new, kept = (
        parse([*base, *words], env={}).args.optimizer
        for words in (["--steps", "8"], ["--steps", "16"], ["--steps", "16", "--decay-steps", "8"])
    )
    said = changed_rate(old, new, 9)
    assert said is not None
    assert "0.000462 at step 9, was to be 0.0001" in said
    assert "decay_steps 8 is now 16" in said
    assert said.endswith("add --decay-steps 8")
    assert changed_rate(old, kept, 9) is None
    long, longer = (parse([*base, "--steps", steps], env={}).args.optimizer for steps in ("4000", "14000"))
    told = changed_rate(long, longer, 43)  # to three digits both are 0.001
    assert told is not None
    assert "0.001 at step 43, was to be 0.0009997" in told


# --- a file in the way ---


def test_a_file_in_the_place_of_a_checkpoint_is_moved_aside_and_kept(tmp_path: Path) -> None:
    """Catches: a save that fails after hours of training, and one that removes what is not the run's."""
    (tmp_path / "step-00000001").write_text("notes")
    (tmp_path / "step-00000002").symlink_to(tmp_path)
    assert checkpoint(tmp_path, {}).is_dir()
    assert (tmp_path / "step-00000001.stray-1").read_text() == "notes"
    save(tmp_path, 2, [Slice("model/w", torch.ones(2), (2,), (0,), True)], {}, World.single())
    assert (tmp_path / "step-00000002.stray-1").is_symlink()
    assert not (tmp_path / "step-00000002").is_symlink()


# --- anything ---

WORDS = (
    st.sampled_from([*flags(), "--config", "--preset", "--set", "--tp", "--prompt", "--rank", "--out", "args", "slurm"])
    | st.sampled_from(["tiny", "FILE", "2", "0", "-1", "99999999999999999999", "nan", "", "auto", "x" * 300, ESCAPE])
    | st.text(max_size=5)
    | st.binary(max_size=5).map(lambda b: b.replace(b"\0", b"0").decode("utf-8", "surrogateescape"))
)
ENVIRONMENT = st.dictionaries(
    st.sampled_from(["COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "WORLD_SIZE", "RANK", "JUPYTER_COLUMNS"]),
    st.sampled_from(["", "0", "1", "-1", "²", "xterm", "9" * 30, ESCAPE]),
    max_size=4,
)
CONTENT = st.binary(max_size=80) | st.sampled_from([content for _, content in FILES.values()])


@given(
    st.sampled_from(["explain", "sample", "layout", "convert", "launch", "x"]),
    st.lists(WORDS, max_size=6),
    ENVIRONMENT,
    CONTENT,
    st.sampled_from([".toml", ".yaml", ".sh", ""]),
    st.sampled_from(["ascii", "latin-1", "utf-8"]),
)
@settings(phases=(Phase.generate, Phase.shrink))
def test_anything_is_answered(
    command: str, words: list[str], env: dict[str, str], content: bytes, suffix: str, encoding: str
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        file = Path(folder) / f"file{suffix}"
        file.write_bytes(content)
        patch.chdir(folder)
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdin", io.StringIO(""))
        code, out, err = answer([command, *(str(file) if w == "FILE" else w for w in words)], encoding)
    assert code in (0, 1, 2)
    assert env.get("FORCE_COLOR") or not {"\x1b", "\x07"} & set(out + err)


@given(st.binary(max_size=30) | st.text(max_size=30).map(str.encode))
def test_any_record_is_answered(text: bytes) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = text.decode("latin-1")
    for each in (value, {"arguments": value}, {"arguments": {"model": value}, "derived": value, "given": value}):
        with suppress(ConfigError):
            assert parse([], env={}, checkpoint=Record.from_dict(each, "x")).args.run.steps
