"""From the command line, files, presets, a checkpoint and the environment to one resolved configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from stretto.arguments.command_line import MEGATRON, CommandLine, read_command_line
from stretto.arguments.errors import ConfigError, Violation, as_text
from stretto.arguments.files import read_config, read_preset
from stretto.arguments.form import RUN, Form
from stretto.arguments.help import say_help
from stretto.arguments.layers import Layer, not_a_value, read_layer, said_by
from stretto.arguments.machine import cache_of, of_machine, uses_gpus
from stretto.arguments.paths import check_paths
from stretto.arguments.record import Record
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value, settings_in
from stretto.arguments.sources import COMMAND_LINE, Source, SourceKind
from stretto.arguments.suggest import explain, suggested_fixes
from stretto.arguments.tree import put, settings
from stretto.arguments.validate import Said, Validation, validate
from stretto.arguments.values import from_text
from stretto.layout import Layout

WORLD_SIZE = "WORLD_SIZE"
"""How torchrun, and stretto itself, tell a worker the number of processes of the run."""


@dataclass(frozen=True)
class Resolved:
    """A valid configuration: every derivable value filled in, and where each value comes from.

    `sources` has an entry for every setting, by its dotted path. `layout` is `args.parallel` as geometry.
    `fallback` is the preset that the run starts from because the words named neither preset nor file, if it does; `own`
    are the options of the command, an instance of the dataclass of its form.
    """

    args: Arguments
    sources: Mapping[str, Source]
    layout: Layout
    fallback: str | None = None
    own: Any = None
    said: Mapping[str, Said] = field(default_factory=dict, repr=False, compare=False)
    """What the layers set, the strongest of each."""

    def also(self, more: Mapping[str, Value]) -> Arguments | None:
        """The same run with these settings on the command line, and this vocabulary; None where a rule rejects it.

        Much quicker than to parse it: nothing is read, and no way out is looked for.
        """
        found = validate({**self.said, **{path: Said(value, COMMAND_LINE) for path, value in more.items()}})
        return None if found.findings else put(found.args, "model.vocab", self.args.model.vocab)

    def record(self) -> Record:
        """Plain data for a checkpoint: `parse(..., checkpoint=...)` goes on from it."""
        return Record.of(self.args, self.sources)

    def with_vocabulary(self, need: int) -> Resolved:
        """The run with a vocabulary that holds a tokenizer of `need` entries. Raises ConfigError where it cannot."""
        vocab, most, name = self.args.model.vocab, settings()["model.vocab"].bounds.at_most, self.args.data.tokenizer
        if most is not None and need > most:
            problem = f"the tokenizer {name!r} has ids up to {need - 1:,}, must be < {most:,}"
            hint = "use another tokenizer"
            raise ConfigError([Violation("vocab_is_bounded", ("data.tokenizer",), problem, hint=hint)])
        if vocab is not None and vocab < need:
            problem = f"model.vocab={vocab}, but the tokenizer {name!r} has {need} entries"
            given = self.sources["model.vocab"].kind in (SourceKind.MODEL, SourceKind.CHECKPOINT)
            fixes, hint = ((), "use the tokenizer of the model") if given else (({"model.vocab": need},), "")
            raise ConfigError([Violation("vocab_holds_tokenizer", ("model.vocab",), problem, fixes=fixes, hint=hint)])
        return self if vocab is not None else replace(self, args=put(self.args, "model.vocab", need))


def parse(
    argv: Sequence[str],
    *,
    world_size: int | None = None,
    env: Mapping[str, str] | None = None,
    checkpoint: Record | Callable[[str, bool], Record | None] | None = None,
    translate: Callable[[Sequence[str]], Layer] | None = None,
    adopt: Callable[[str], Layer] | None = None,
    files: bool = True,
    form: Form = RUN,
    fallback: str | None = None,
    gpus: Callable[[], int] | None = None,
) -> Resolved:
    """The run that a command line asks for.

    `--help` prints the settings and exits.

    Stronger sources override weaker ones: command line > WORLD_SIZE (which sets run.nproc alone) > file >
    checkpoint > model > preset > default. No preset is taken that nobody named: the run starts from the defaults.

    Args:
        argv: the words after the command, as in `["--tp", "2"]`.
        world_size: number of processes, where the caller knows it; else WORLD_SIZE in `env`, else run.nproc.
        env: the environment; None means os.environ.
        checkpoint: the record of the run to go on from; or how to find it among the checkpoints of a run, called
            where `checkpoint.resume` (then with True: there must be one) or `auto_resume` is asked for.
        translate: what the words after `--megatron` stand for; without it they are rejected.
        adopt: the settings that the directory of `checkpoint.init_from` says; without it they are not asked for.
        files: whether to look that data and tokenizer exist on this machine.
        form: the command, with options of its own.
        fallback: the preset to start from where `argv` names neither preset nor file and there is no checkpoint to
            go on from; None: that of the form.
        gpus: how many there are for processes that this command starts; then device and number of processes follow
            from it where nobody says them, and a fallback gives way to the one for GPUs.

    Raises:
        ConfigError: with everything that is wrong.
        SystemExit: after `--help`.
    """
    if {"-h", "--help"} & set(argv):
        say_help(form)
    line, fallback = read_command_line(argv, form.own), fallback or form.fallback
    files_named = [*map(read_config, line.all_of("config")), *_foreign(line, translate)]
    record = _found(checkpoint, (*files_named, line.layer)) if callable(checkpoint) else checkpoint
    presets = [*map(read_preset, line.all_of("preset"))]
    model = _model(adopt, (*presets, *files_named, line.layer)) if record is None else []
    if presets or files_named or model or record is not None:
        fallback = None
    env = os.environ if env is None else env
    surroundings = _surroundings(world_size, env)
    here = None if surroundings.values or surroundings.wrong else gpus
    if fallback is not None and here is not None and uses_gpus([line.layer], here):
        fallback = f"{fallback}-gpu"
    layers = [
        cache_of(env),
        *([read_preset(fallback)] if fallback else presets),
        *model,
        *([read_layer(record.carried(), Source(SourceKind.CHECKPOINT, record.name))] if record else []),
        *files_named,
        surroundings,
        line.layer,
    ]
    if here is not None:
        layers.insert(0, of_machine(layers, here, whole=fallback is not None))
    own = {s.name: line.own[s.path] for s in settings_in(form.own) if s.path in line.own}
    return replace(resolve(layers, files=files), fallback=fallback, own=form.own(**own))


def resolve(layers: Sequence[Layer], *, files: bool = False) -> Resolved:
    """The configuration of these layers, weakest first. Raises ConfigError with everything that is wrong."""
    said: dict[str, Said] = {}
    wrong: dict[str, Value] = {}
    violations = [*_contradictions(layers)]
    for layer in layers:
        said |= {path: Said(value, layer.source) for path, value in layer.values.items()}
        wrong = {path: near for path, near in wrong.items() if path not in layer.values} | {**layer.wrong}

    found = validate(said, wrong)
    for layer in layers:
        violations += (_with_fixes(v, said, wrong, found) for v in layer.violations)
    unread = any(layer.source.kind is SourceKind.MODEL and layer.violations for layer in layers)
    # Of a model that cannot be read nobody knows the shape: what would be wrong with the default one is no news.
    unknown = {path for path in settings() if unread and _is_shape(path) and path not in said}
    violations += (v for v in explain(said, wrong, found) if not unknown & set(v.fields))
    if files:
        violations += (v for v in check_paths(found.args) if not set(v.fields) & set(wrong))
    if violations:
        raise ConfigError(violations)

    return Resolved(found.args, found.sources, found.args.parallel.layout, said=said)


def _foreign(line: CommandLine, translate: Callable[[Sequence[str]], Layer] | None) -> list[Layer]:
    """What another program's flags stand for, if there are any."""
    if line.foreign is None:
        return []
    if translate is None:
        problem = f"{MEGATRON} is not taken here: `stretto convert args` makes a file of it"
        return [Layer(COMMAND_LINE, {}, (Violation("command_line", (), problem),))]
    return [translate(line.foreign)]


def _found(find: Callable[[str, bool], Record | None], layers: Sequence[Layer]) -> Record | None:
    """The record of the run that these layers, weakest first, say to go on from, if there is one or must be."""
    said = said_by(layers)
    out = said.get("checkpoint.out", settings()["checkpoint.out"].default)
    where = said.get("checkpoint.checkpoint_dir") or f"{out}/checkpoints"
    required = bool(said.get("checkpoint.resume"))
    return find(str(where), required) if required or said.get("checkpoint.auto_resume") else None


def _model(adopt: Callable[[str], Layer] | None, layers: Sequence[Layer]) -> list[Layer]:
    """What the model says that these layers, weakest first, want to begin with."""
    directory = said_by(layers).get("checkpoint.init_from")
    return [adopt(str(directory))] if adopt is not None and directory is not None else []


def _surroundings(world_size: int | None, env: Mapping[str, str]) -> Layer:
    """The number of processes, where a launcher has already started them."""
    s = settings()["run.nproc"]
    if world_size is not None:
        return Layer(Source(SourceKind.ENVIRONMENT, "launcher"), {s.path: world_size})
    source = Source(SourceKind.ENVIRONMENT, WORLD_SIZE)
    if WORLD_SIZE not in env:
        return Layer(source, {})
    try:
        return Layer(source, {s.path: from_text(s, env[WORLD_SIZE])})
    except ValueError as error:
        problem = replace(not_a_value(s, str(error), source), rule="environment", hint=f"unset {WORLD_SIZE}")
        return Layer(source, {}, (problem,), {s.path: None})


def _contradictions(layers: Sequence[Layer]) -> Iterator[Violation]:
    """What the user says against what is a fact: the shape of a model, the processes that a launcher has started."""
    for fact, layer in product(layers, layers):
        if fact.source.kind >= layer.source.kind:
            continue
        for path, said in layer.values.items():
            there = fact.values.get(path, said)
            if fact.source.kind is SourceKind.MODEL and _is_shape(path) and said != there:
                problem = f"{path} = {as_text(said)} ({layer.source}), but {fact.source.name} has {as_text(there)}"
                yield Violation("model_has_shape", (path,), problem, hint=f"leave {settings()[path].flag} out")
            if fact.source.pinned and path == "run.nproc" and said != there:
                problem = f"--nproc {said}, but {fact.source} says that {there} processes run"
                yield Violation("nproc_is_world", (path,), problem, fixes=({path: there},), hint="or leave --nproc out")


def _is_shape(path: str) -> bool:
    """Whether a model that a run begins with says it: what is not that would make other tensors of it."""
    return path.startswith("model.") or path in ("tuning.lora_rank", "tuning.lora_alpha", "tuning.lora_targets")


def _with_fixes(v: Violation, said: Mapping[str, Said], wrong: Mapping[str, Value], found: Validation) -> Violation:
    """A rejected value with a legal one that goes with the rest."""
    path = v.fields[0] if v.fields else ""
    if v.rule != "value" or path not in wrong:
        return v
    s = settings()[path]
    near = [wrong[path], s.default, *((2**n for n in range(16)) if s.kind is int else ())]
    nearby = {path: [value for value in near if value is not None]}
    fixes = suggested_fixes(said, wrong, found, (v.rule, v.fields), nearby)
    return replace(v, fixes=fixes, hint=f"{'or ' if fixes else ''}leave {path} out" if s.optional else "")
