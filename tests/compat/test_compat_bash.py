"""Scripts are read as bash reads them: what it would pass on, nothing lost and nothing invented (P29).

Random scripts, in the forms that launch scripts are written in, are given to bash itself, with a stand-in for the
program that prints its words.

Faults to catch: a default that counts for a name that is set; blanks in quotes that split; the value of `+=` in the
wrong order; a branch that is not taken; division that rounds down; a local variable that outlives its function; a
pattern that takes the shortest where the longest is asked for.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stretto.compat.megatron.bash import read

pytestmark = pytest.mark.pure

STUB = "#!/bin/sh\nprintf '%s\\0' \"$@\"\nprintf 'END\\0'\n"


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("bin")
    for name in ("torchrun", "srun", "python"):
        (where / name).write_text(STUB)
        (where / name).chmod(0o755)
    return where


def by_bash(stubs: Path, script: str, *arguments: str, **variables: str) -> list[list[str]]:
    """The words of each program that a script starts, from bash itself."""
    env = {"PATH": f"{stubs}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8", **variables}
    done = subprocess.run(
        ["bash", "-c", script, "run.sh", *arguments], env=env, capture_output=True, text=True, check=False, cwd=stubs
    )
    assert not done.stderr, f"{done.stderr}\n{script}"
    calls, words = [], list[str]()
    for word in done.stdout.split("\0"):
        if word == "END":
            calls.append(words)
            words = []
        else:
            words.append(word)
    return calls


def by_reading(script: str, *arguments: str, **variables: str) -> list[list[str]]:
    calls = read(script, arguments=arguments, given=variables).calls
    return [list(c.words[1:]) for c in calls if c.words[0] in ("torchrun", "srun", "python")]


def holds(stubs: Path, script: str, *arguments: str, **variables: str) -> None:
    assert by_reading(script, *arguments, **variables) == by_bash(stubs, script, *arguments, **variables), script


PLAIN = st.text("abcxyz0189./_,=-+:@%", min_size=1, max_size=8).map(lambda t: f"v{t}")
ANY = st.text("ab 0'\"$`\\*?[]{}()<>|&;#!~=\t\né", max_size=8)
NUMBER = st.integers(0, 99)
NAME = st.sampled_from(["A", "B", "LAYERS", "tp_size", "X1", "_y"])
Piece = tuple[list[str], str]
"""Lines of a script, and what the command then has among its words."""


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def doubled(text: str) -> str:
    return '"' + "".join(f"\\{c}" if c in '$`"\\' else c for c in text) + '"'


@st.composite
def value(draw: st.DrawFn) -> str:
    """A value, in some quotes."""
    return draw(st.one_of(PLAIN, ANY.map(quoted), ANY.map(doubled), st.tuples(PLAIN, ANY.map(doubled)).map("".join)))


@st.composite
def flags(draw: st.DrawFn) -> list[str]:
    return [
        f"--f{draw(NUMBER)}{draw(st.sampled_from([' ', '=']))}{draw(value())}" for _ in range(draw(st.integers(1, 3)))
    ]


@st.composite
def plain_flags(draw: st.DrawFn) -> str:
    blank = draw(st.sampled_from([" ", "  ", " \\\n    ", "\n   "]))
    return blank.join(f"--p{draw(NUMBER)} {draw(PLAIN)}" for _ in range(draw(st.integers(1, 3))))


@st.composite
def array(draw: st.DrawFn, name: str) -> Piece:
    between = draw(st.sampled_from([" ", "\n  ", "  # it is said\n  ", " \\\n "]))
    words = draw(flags())
    lines = [
        f"{draw(st.sampled_from(['', 'declare -a ', 'export ']))}{name}=({words[0]}",
        f"{between.join(words[1:])}",
        ")",
    ]
    if draw(st.booleans()):
        lines.append(f"{name}+=({between.join(draw(flags()))}{between.rstrip(' ')}\n)")
    how = draw(st.sampled_from(['"${%s[@]}"', '"${%s[@]}"', '"${%s[*]}"', "${#%s[@]}", '"${%s[@]:1}"', '"${%s}"']))
    return lines, how % name


@st.composite
def text(draw: st.DrawFn, name: str) -> Piece:
    lines = [f'{name}="{draw(plain_flags())}"']
    lines += [f'{name}+=" {draw(plain_flags())}"' for _ in range(draw(st.integers(0, 2)))]
    if draw(st.booleans()):
        lines.append(f'{name}="${name} {draw(plain_flags())}"')
    return lines, draw(st.sampled_from([f"${name}", f"${{{name}}}", f'"${name}"']))


@st.composite
def default(draw: st.DrawFn, name: str) -> Piece:
    set_before = draw(st.sampled_from([[], [f"{name}={draw(value())}"], [f"{name}="], [f"unset {name}"]]))
    op = draw(st.sampled_from([":-", "-", ":=", "=", ":+", "+"]))
    inner = draw(st.one_of(PLAIN, PLAIN.map(lambda p: f"${{{name}Z:-{p}}}"), NUMBER.map(lambda n: f"$(({n}*2))")))
    use = f"${{{name}{op}{inner}}}"
    if draw(st.booleans()):
        return [*set_before, f"{name}C={use}"], f'--d "${name}C"'
    if op in (":=", "=") and draw(st.booleans()):
        return [*set_before, f': "{use}"'], f'--d "${name}"'
    return set_before, f'--d "{use}"'


@st.composite
def arithmetic(draw: st.DrawFn, name: str) -> Piece:
    a, b, c = draw(NUMBER), draw(NUMBER), draw(NUMBER)
    form = draw(
        st.sampled_from(
            [
                "{n}*{b}",
                "({n}+{b})/({c}+1)",
                "-{n} / 7",
                "${n}%7-{c}",
                "{n}>{b}?{n}:{c}",
                "${{{n}}}**2",
                "{n} << 2 | {c}",
            ]
        )
    )
    lines = [f"{name}={a}", *draw(st.sampled_from([[], [f"(({name}++))"], [f"(( {name} += 3 ))"], [f"let {name}*=2"]]))]
    return lines, f"--n $(({form.format(n=name, b=b, c=c)}))"


@st.composite
def branch(draw: st.DrawFn, name: str) -> Piece:
    chosen, *tested = (draw(st.sampled_from(["7B", "13B", "x y", "70b", ""])) for _ in range(4))
    form = draw(
        st.sampled_from(
            [
                *('[ "${n}" = {q} ]', "[[ ${n} == {q} ]]", "[[ ${n} = {p}* && -n ${n} ]]", '[ -z "${n}" ]'),
                *('test "${n}" != {q}', "[[ ! ( ${n} =~ ^[0-9]+B$ ) ]]", "(( ${{#{n}}} > 2 ))"),
            ]
        )
    )

    def condition(t: str) -> str:
        return form.format(n=name, q=quoted(t), p=t[:1] or "z")

    if draw(st.booleans()):
        body = "".join(
            f"  {draw(st.sampled_from([quoted(t), f'{t[:1]}*', f'1*|{quoted(t)}']))}) {name}V={draw(PLAIN)} ;;\n"
            for t in tested
        )
        lines = [f"{name}={quoted(chosen)}", f"{name}V=no", f'case "${name}" in\n{body}esac']
    else:
        lines = [
            f"{name}={quoted(chosen)}; {name}V=no",
            f"if {condition(tested[0])}; then\n  {name}V={draw(value())}",
            f"elif {condition(tested[1])}\nthen {name}V={draw(value())}",
            *draw(st.sampled_from([[], [f"else {name}V={draw(value())}"]])),
            "fi",
        ]
    return lines, f'--c "${name}V"'


@st.composite
def edited(draw: st.DrawFn, name: str) -> Piece:
    given_ = draw(st.text("ab./", max_size=8))
    pattern = draw(st.sampled_from(["a*", "*/", "?", "[ab]", ".", "*.", "b", "'*'"]))
    op = draw(st.sampled_from(["#", "##", "%", "%%", "/", "//"]))
    tail = "/Z" if op[0] == "/" else ""
    use = draw(
        st.sampled_from([f"${{{name}{op}{pattern}{tail}}}", f"${{{name}:1:2}}", f"${{#{name}}}", f"${{{name}^^}}"])
    )
    return [f"{name}={quoted(given_)}"], f'--e "{use}"'


@st.composite
def repeated(draw: st.DrawFn, name: str) -> Piece:
    words = " ".join(draw(st.lists(value(), min_size=1, max_size=3)))
    return [
        f"{name}=()",
        f"for one in {words} {{1..3}} k{{a,b}}; do",
        f'  {name}+=(--r "$one")',
        "done",
    ], f'"${{{name}[@]}}"'


@st.composite
def function(draw: st.DrawFn, name: str) -> Piece:
    body = f'{name}F() {{ local {name}L="$1"; {name}R="${name}L-$#"; return 0; }}'
    return [f"{name}L=outer", body, f"{name}F {draw(value())} {draw(PLAIN)}"], f'--g "${name}R" "${name}L"'


@st.composite
def table(draw: st.DrawFn, name: str) -> Piece:
    return [
        f"declare -A {name}T=([small]={draw(value())} [large]={draw(PLAIN)})",
        f"{name}K={draw(st.sampled_from(['small', 'large']))}",
    ], f'--t "${{{name}T[${name}K]}}" ${{#{name}T[@]}}'


@st.composite
def output(draw: st.DrawFn, name: str) -> Piece:
    said = draw(PLAIN)
    command = draw(
        st.sampled_from([f"echo {said}", f"printf %s {said}", f"dirname /x/{said}", f"basename {said}/y.sh .sh"])
    )
    return [f"{name}=$({command})", f"{name}B=`{command}`"], f'--o "${name}" "${name}B"'


PIECES: tuple[Callable[[str], st.SearchStrategy[Piece]], ...] = (
    array, text, default, arithmetic, branch, edited, repeated, function, table, output,
)  # fmt: skip
NOISE = (
    "set +x",
    "export CUDA_DEVICE_MAX_CONNECTIONS=1",
    "# a 'comment'",
    "mkdir -p logs",
    "echo $((1+2)) > /dev/null",
    "",
)


@st.composite
def scripts(draw: st.DrawFn) -> str:
    lines, words = ["#!/bin/bash"], list[str]()
    for n in range(draw(st.integers(1, 4))):
        piece, use = draw(draw(st.sampled_from(PIECES))(f"{draw(NAME)}{n}"))
        lines += [draw(st.sampled_from(NOISE)), *piece]
        words.append(use)
    launcher = draw(
        st.sampled_from(["torchrun --nproc_per_node 8", "srun -l torchrun", "python -m torch.distributed.run"])
    )
    blank = draw(st.sampled_from([" ", " \\\n  ", "   "]))
    command = blank.join([launcher, "pretrain_gpt.py", *words, *draw(flags())])
    ending = draw(st.sampled_from(["plain", "plain", "eval", "child", "variable", "group", "function", "log"]))
    if ending == "eval":
        lines += [f"cmd={doubled(command)}", 'eval "$cmd"']
    elif ending == "child":
        lines += [
            f"ARGS=({' '.join([*words, '--last'])})",
            "srun_=srun",
            '$srun_ torchrun pretrain_gpt.py "${ARGS[@]}"',
        ]
    elif ending == "variable":
        lines += ['CMD="torchrun pretrain_gpt.py"', f"$CMD {' '.join(words)} || exit 1"]
    else:
        wrapped = {"group": f"{{ {command}; }}", "function": f"go() {{ {command}\n}}\ngo", "log": f"{command} 2>&1"}
        lines.append(wrapped.get(ending, command))
    return "\n".join(lines) + "\n"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=scripts())
def test_what_is_read_is_what_bash_passes_on(stubs: Path, script: str) -> None:
    holds(stubs, script)


FORMS = (Path(__file__).parent / "forms.txt").read_text(encoding="utf-8").rstrip("\n").split("\n%%\n")
"""One form of the language at a time."""


@pytest.mark.parametrize("script", FORMS)
def test_each_form_is_read_as_bash_does(stubs: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (stubs / "model.sh").write_text("MODEL=(--layers 3)\nL=${1:-none}\nreturn 0\nMODEL=(no)\n")
    monkeypatch.chdir(stubs)
    holds(stubs, script)
