"""What a run resolves to, and where each value comes from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stretto.arguments import (
    ConfigError,
    Record,
    Resolved,
    SourceKind,
    Violation,
    as_toml,
    from_dict,
    parse,
    paths,
    to_dict,
)
from stretto.arguments.command_line import flags
from stretto.arguments.derive import DERIVATIONS
from stretto.arguments.elsewhere import validated_in
from stretto.arguments.errors import as_flag
from stretto.arguments.files import presets
from stretto.arguments.tree import get, settings
from stretto.cli.words import parse_or_demo
from stretto.layout import Layout

pytestmark = pytest.mark.pure


def resolve(words: str = "", **known: object) -> Resolved:
    return parse_or_demo(words.split(), env={}, **known)  # type: ignore[arg-type]


def rejections(words: str, **known: object) -> tuple[Violation, ...]:
    with pytest.raises(ConfigError) as caught:
        resolve(words, **known)
    return caught.value.violations


def test_never_imports_torch() -> None:
    code = "import stretto.arguments as a, sys; a.parse([], env={}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_word_the_demo_runs_on_eight_ranks() -> None:
    demo = resolve()
    assert demo.layout == Layout.of(tp=2, pp=2, dp=2)
    assert demo.args.parallel.sequence_parallel
    assert str(demo.sources["parallel.tp"]) == "preset demo"
    assert str(demo.sources["parallel.dp"]) == "derived: nproc / (tp*cp*pp) = 8 / (2*1*2)"


@pytest.mark.parametrize("words", ["", "--heads 4"])
def test_the_library_starts_from_the_defaults_that_help_prints(words: str) -> None:
    """Catches: the demo taken in `parse`, 2 layers where `--help` says 4."""
    r = parse(words.split(), env={})
    said = {"model.heads"} if words else set()
    assert r.fallback is None
    assert {
        path for path, source in r.sources.items() if source.kind not in (SourceKind.DEFAULT, SourceKind.DERIVED)
    } == said
    given = {path: s.default for path, s in settings().items() if s.default is not None and path not in said}
    assert {path: get(r.args, path) for path in given} == given


def test_a_command_falls_back_on_the_demo_only_where_nothing_else_is_named(tmp_path: Path) -> None:
    """Catches: a fallback that is applied, or told of, beneath a preset, a file or a checkpoint."""
    file = tmp_path / "run.toml"
    file.write_text("[model]\nlayers = 2\n")
    assert resolve("--tp 1 --pp 4 --steps 300").fallback == "demo"
    assert resolve("--tp 1 --pp 4 --steps 300").args.model.layers == 2
    for words in ("--preset tiny", f"--config {file}"):
        assert resolve(words).fallback is None
    again = resolve("", checkpoint=resolve("--preset tiny").record())
    assert (again.fallback, again.args.model.layers) == (None, resolve("--preset tiny").args.model.layers)


def test_flags_are_unique_over_all_sections() -> None:
    assert len(flags()) == len(settings())
    assert not [f for f in flags() if f.startswith("--no-")]


@pytest.mark.parametrize(
    ("word", "meant"), [("--device gpu", "cuda"), ("--dtype float32", "fp32"), ("--dtype bf61", "bf16")]
)
def test_what_a_choice_is_called_elsewhere_is_understood_and_rejected(word: str, meant: str) -> None:
    """Catches: `gpu` taken for `cpu`, which it looks like."""
    (rejection,) = rejections(f"--preset tiny {word}")
    assert rejection.problem.endswith(f"; did you mean {meant}?")
    assert [*rejection.fixes[0].values()] == [meant]


def test_stronger_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[batch]\nseq_len = 64\nmicro_batch = 2\n")
    r = resolve(f"--preset tiny --config {file} --micro-batch 4")
    b = r.args.batch
    assert (b.seq_len, b.micro_batch, b.global_batch) == (64, 4, 8)
    kinds = [r.sources[f"batch.{n}"].kind for n in ("seq_len", "micro_batch", "global_batch")]
    assert kinds == [SourceKind.FILE, SourceKind.COMMAND_LINE, SourceKind.PRESET]
    assert r.sources["run.seed"].kind is SourceKind.DEFAULT


def test_set_and_equals_say_the_same_as_a_flag() -> None:
    said = [resolve(f"--preset tiny {w}").args for w in ("--tp 2", "--tp=2", "--set parallel.tp=2")]
    assert said[0] == said[1] == said[2]


def test_every_derivable_value_is_filled() -> None:
    r = resolve("--preset tiny --lr-schedule wsd")
    unset = [path for path in settings() if getattr(getattr(r.args, path.split(".")[0]), path.split(".")[1]) is None]
    apart = {"model.expert_ffn", "model.rope_head_dim", "model.v_head_dim"}  # this model has no experts, no latents
    derived = {d.path for d in DERIVATIONS} - apart
    derived |= {"run.tensorboard"}  # the preset says
    assert unset == [path for path, s in settings().items() if s.default is None and path not in derived]
    assert (r.args.optimizer.decay_steps, r.args.optimizer.cooldown_steps) == (4, 1), "at least one step"
    assert (r.args.model.kv_heads, r.args.model.head_dim, r.args.model.ffn) == (2, 8, 48)


def test_graphs_of_experts_follow_from_sizes_that_are_derived() -> None:
    """Catches: a default that is derived before what it reads, and then rejected as if somebody had said it."""
    words = "--nproc 1 --tp 1 --pp 1 --dp 1 --experts 4 --hidden 256 --heads 4 --vocab 4096 --device cuda --dtype bf16"
    for activation, ffn in (("swiglu", 704), ("gelu", 1024)):
        r = resolve(f"{words} --activation {activation}")
        assert (r.args.model.ffn, r.args.run.cuda_graphs) == (ffn, ffn % 128 == 0)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_valid(preset: str) -> None:
    assert resolve(f"--preset {preset}")


def test_the_launcher_decides_how_many_processes_there_are() -> None:
    r = parse_or_demo([], env={"WORLD_SIZE": "4"})
    assert (r.layout.world, r.args.parallel.dp, r.args.run.nproc) == (4, 1, 4)
    assert str(r.sources["run.nproc"]) == "environment WORLD_SIZE"
    assert parse_or_demo([], env={"WORLD_SIZE": "4"}, world_size=16).layout.size("dp") == 4
    with pytest.raises(ConfigError, match=r"--nproc 8, but environment WORLD_SIZE says that 4 processes run"):
        parse(["--nproc", "8"], env={"WORLD_SIZE": "4"})


def test_what_depends_on_a_value_that_gives_way_gives_way_too() -> None:
    """Catches: the factor of a preset's stretch rejected, where --position learned has left the preset no stretch."""
    words = "--preset llama3.1-8b --position learned"
    assert resolve(words).sources["model.rope_factor"].kind is SourceKind.DERIVED
    with pytest.raises(ConfigError, match=r"rope_factor = 2\.0 has no effect: rope_scaling = none"):
        resolve(f"{words} --rope-factor 2")


@pytest.mark.parametrize(
    ("file", "words", "path"),
    [
        ("[run]\nrecompute = 'selective'\nrecompute_parts = ['norms']", "--recompute block", "run.recompute_parts"),
        ("[run]\nrecompute = 'block'\nrecompute_layers = 1", "--recompute offload", "run.recompute_layers"),
        ("[parallel]\ncp = 4\ncp_comm = ['hybrid']\ncp_a2a = 2", "--cp-comm ring", "parallel.cp_a2a"),
        ("[parallel]\ntp = 2\netp = 2\n[model]\nexperts = 4", "--experts 0", "parallel.etp"),
        ("[tuning]\nfreeze = ['model.norm.*']", "--lora-rank 4", "tuning.freeze"),
        ("[tuning]\nlora_rank = 4\nlora_alpha = 8.0", "--lora-rank 0", "tuning.lora_alpha"),
    ],
)
def test_what_a_stronger_source_leaves_without_effect_gives_way(
    file: str, words: str, path: str, tmp_path: Path
) -> None:
    """Catches: a rejection of what nobody said on the command line. Said there as well, it is one."""
    config = tmp_path / "run.toml"
    config.write_text(file)
    given = resolve(f"--config {config} {words}")
    assert given.sources[path].kind is SourceKind.DERIVED
    config.write_text("")
    said = as_flag(path, {"run.recompute_parts": ("norms",), "tuning.freeze": ("x",)}.get(path, 2))
    with pytest.raises(ConfigError, match=f"{path} = .* has no effect"):
        resolve(f"--preset tiny {words} {said}")


def test_without_nproc_the_layout_decides() -> None:
    assert resolve("--preset tiny --tp 2 --dp 4").layout.world == 8
    assert resolve("--preset tiny --tp 2").layout.world == 2
    wide = resolve("--dp 4 --tp 1 --pp 1")
    assert wide.layout.world == 4, "the preset's nproc gives way to the flag's dp"
    assert (wide.args.batch.micro_batch, wide.args.batch.global_batch) == (1, 4), "as does its microbatch"


def test_a_preset_gives_way_and_a_flag_does_not() -> None:
    quiet = resolve("--tp 1")
    assert not quiet.args.parallel.sequence_parallel
    assert str(quiet.sources["parallel.sequence_parallel"]) == "derived: tp = 1, nothing to cut"
    assert resolve("--preset llama3-8b --position learned").args.model.rope_base == 10_000
    (loud,) = rejections("--tp 1 --sequence-parallel")
    assert loud.rule == "has_effect"
    assert loud.fixes[0] == {"parallel.sequence_parallel": False}


def test_resolved_toml_is_a_run_of_its_own(tmp_path: Path) -> None:
    first = resolve('--steps 5 --layers 6 --stage-layers 4,2 --dtype bf16 --out a"b\\c')
    file = tmp_path / "resolved.toml"
    file.write_text(as_toml(first))
    assert resolve(f"--config {file}").args == first.args
    assert resolve(f"--config {file} --nproc 16").args.parallel.dp == 4, "derived values are derived again"


def test_yaml_numbers_are_numbers_and_words_are_words(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "optimizer: {lr: 1e-3}\ncheckpoint:\n  out: no\nparallel: {stage_layers: [1, 2], pp: 2}\nmodel: {layers: 3}\n"
    )
    r = resolve(f"--config {file}")
    assert (r.args.optimizer.lr, r.args.checkpoint.out, r.args.parallel.stage_layers) == (1e-3, "no", (1, 2))
    file.write_text("run: {seed: 010}\n")  # 8 in YAML 1.1
    assert resolve(f"--config {file}").args.run.seed == 10
    file.write_text("model: {layers: null}\n")
    (nothing,) = rejections(f"--config {file}")
    assert "null is no value here, must be a whole number" in nothing.problem
    file.write_text("model: {layers: 3}\nmodel: {layers: 4}\n")
    (twice,) = rejections(f"--config {file}")
    assert "the key 'model' stands twice" in twice.problem


def test_a_checkpoint_stands_between_preset_and_file() -> None:
    first = resolve("--preset tiny --seed 7 --tp 2 --out elsewhere")
    record = Record.from_dict(first.record().as_dict(), "step 4")
    again = resolve("--steps 9", checkpoint=record)
    assert (again.args.run.seed, again.args.model.ffn, again.args.run.steps) == (7, 48, 9)
    assert str(again.sources["run.seed"]) == "checkpoint step 4"
    assert again.args.optimizer.decay_steps == 9, "derived values are derived again"
    assert again.args.checkpoint.out == "runs/latest", "where a run writes is not taken from a checkpoint"
    assert resolve("--dp 2", checkpoint=record).layout == Layout.of(tp=2, dp=2)


def test_a_checkpoint_is_looked_for_only_to_resume_and_before_anything_is_judged() -> None:
    """A model of 8 heads goes on with tp=4, which the 6 heads of the demo would not."""
    record = Record.from_dict(resolve("--preset tiny --heads 8 --kv-heads 4 --nproc 4").record().as_dict(), "step 4")
    asked: list[tuple[str, bool]] = []

    def find(directory: str, required: bool) -> Record:
        asked.append((directory, required))
        return record

    assert resolve("", checkpoint=find).args.model.heads == 6
    assert asked == []
    again = resolve("--resume --out there --tp 4", checkpoint=find)
    assert asked == [("there/checkpoints", True)]
    assert (again.args.model.heads, again.layout) == (8, Layout.of(tp=4))
    assert resolve("--resume", checkpoint=find).args.run.nproc == 4, "as many processes as before"
    assert resolve("--auto-resume --out there", checkpoint=find).args.model.heads == 8
    assert asked[-1] == ("there/checkpoints", False)
    resolve("--resume --out there --checkpoint-dir s3://b/c", checkpoint=find)
    assert asked[-1] == ("s3://b/c", True)
    assert resolve("--auto-resume", checkpoint=lambda *_: None).args.model.heads == 6, "it begins where there is none"


def test_a_value_that_gave_way_once_stays_so_in_file_and_checkpoint(tmp_path: Path) -> None:
    """The preset's min_lr gives way to --lr; found anew it would be judged beside the default instead."""
    first = resolve("--lr 1e-5")
    assert first.args.optimizer.min_lr == pytest.approx(1e-6)
    record = Record.from_dict(first.record().as_dict(), "step 4")
    assert resolve("", checkpoint=record).args.optimizer == first.args.optimizer
    (tmp_path / "resolved.toml").write_text(as_toml(first))
    assert resolve(f"--config {tmp_path}/resolved.toml").args == first.args


def test_plain_data_round_trip_is_strict() -> None:
    args = resolve().args
    assert from_dict(to_dict(args)) == args
    bad = to_dict(args)
    bad["parallel"]["tp"] = True
    bad["run"]["sede"] = 1
    with pytest.raises(ConfigError) as caught:
        from_dict(bad)
    assert [v.rule for v in caught.value.violations] == ["value", "unknown_setting"]


def test_a_tokenizer_may_be_a_file_or_the_directory_that_has_it(tmp_path: Path) -> None:
    (tokenizer,) = rejections(f"--tokenizer {tmp_path}")
    assert tokenizer.problem == f"there is no file {tmp_path}/tokenizer.json"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve(f"--tokenizer {tmp_path}").args.model.vocab is None, "known once the tokenizer is read"
    assert resolve(f"--tokenizer {tmp_path}/tokenizer.json")


def test_tables_and_lists_of_names_survive_file_and_checkpoint(tmp_path: Path) -> None:
    words = "--preset tiny --tp 2 --dp 2 --device cuda --timeouts tp=60,dp-cp=9 --high-priority tp,dp --max-ctas dp=4"
    first = resolve(words)
    assert first.args.groups.timeouts == (("tp", 60), ("dp-cp", 9))
    assert first.args.nccl.high_priority == ("tp", "dp")
    file = tmp_path / "resolved.toml"
    file.write_text(as_toml(first))
    assert resolve(f"--config {file}").args == first.args
    assert from_dict(to_dict(first.args)) == first.args
    assert resolve("", checkpoint=Record.from_dict(first.record().as_dict(), "step 4")).args.nccl == first.args.nccl
    file.write_text("[groups.timeouts]\ntp = 60\n[parallel]\ntp = 2\n")
    assert resolve(f"--config {file}").args.groups.timeouts == (("tp", 60),)


def test_options_of_nccl_give_way_to_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[run]\ndevice = "cuda"\n[parallel]\ntp = 2\n[nccl]\nhigh_priority = ["tp"]\n')
    r = resolve(f"--config {file} --device cpu")
    assert r.args.nccl.high_priority == ()
    assert str(r.sources["nccl.high_priority"]) == "derived: device = cpu has no NCCL"


def test_the_order_is_that_of_the_ranks() -> None:
    assert resolve("--tp 2 --dp 2 --pp 2 --order pp-dp-tp").layout == Layout.of(tp=2, dp=2, pp=2, order="pp-dp-tp")


def test_what_hides_messages_goes_with_them() -> None:
    """As `stretto verify` wants it: the reference of a run on GPUs has nothing to hide, nor has a layout without tp."""
    run = resolve("--preset tiny --device cuda --tp 2 --sequence-parallel --nproc 2")
    assert run.args.parallel.tp_comm_overlap
    for layout, hidden in ((Layout.of(), False), (Layout.of(pp=2), False), (Layout.of(tp=2), True)):
        moved = validated_in(run.args, layout).args.parallel
        assert (moved.tp_comm_overlap, moved.sequence_parallel) == (hidden, hidden)


@pytest.mark.parametrize("words", ["--tp 1 --nproc 1", "--no-sequence-parallel", "--device cpu"])
def test_hiding_gives_way_to_what_leaves_nothing_to_hide(words: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[parallel]\ntp = 2\nsequence_parallel = true\ntp_comm_overlap = true\n[run]\ndevice = "cuda"\n')
    said = parse(["--preset", "tiny", "--config", str(file), "--nproc", "2", *words.split()], env={}, files=True)
    assert said.args.parallel.tp_comm_overlap is False


def test_a_package_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a run that starts all its ranks before it finds that a tracker is not installed."""
    monkeypatch.setattr(paths, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as error:
        parse(["--wandb", "mine", "--tensorboard"], env={})
    assert {v.hint.split(",")[0] for v in error.value.violations} == {
        "pip install 'stretto[wandb]'",
        "pip install 'stretto[tensorboard]'",
    }
    assert parse(["--no-tensorboard"], env={}).args.run.tensorboard is False


def test_layers_of_stages_give_way_to_other_stages(tmp_path: Path) -> None:
    """Catches: a file that was made for pp = 2, and a checkpoint of it, that no other pp goes on from."""
    file = tmp_path / "made.toml"
    file.write_text("[model]\nlayers = 8\n[parallel]\npp = 2\nstage_layers = [5, 3]\n")
    assert parse(["--config", str(file)]).args.parallel.stage_layers == (5, 3)
    assert parse(["--config", str(file), "--pp", "4"]).args.parallel.stage_layers is None
    with pytest.raises(ConfigError, match="stage_layers has 2 entries"):
        parse(["--config", str(file), "--pp", "4", "--stage-layers", "4,4"])
