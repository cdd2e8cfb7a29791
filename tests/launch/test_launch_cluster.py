"""Batch scripts and manifests: the files beside this one, their syntax, and what they do when a run ends."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stretto.cli.launch import main
from stretto.launch.kubernetes import KubernetesJob
from stretto.launch.slurm import SlurmJob
from stretto.launch.slurm_time import limit_seconds

pytestmark = pytest.mark.pure

DATA = Path(__file__).parent / "data"
TRAIN = ("--tp", "2", "--data", "my text")
SLURM = SlurmJob(
    nodes=2,
    gpus_per_node=4,
    partition="h100",
    account="lab",
    cpus_per_task=12,
    time="3:30:00",
    setup="source venv/bin/activate",
    train=TRAIN,
)
KUBERNETES = KubernetesJob(nodes=2, gpus_per_node=4, claim="disk", image="registry/stretto:0.1", train=TRAIN)


def test_batch_script_is_the_recorded_one() -> None:
    assert SLURM.script() == (DATA / "two_nodes.sbatch").read_text()


def test_manifest_is_the_recorded_one() -> None:
    assert KUBERNETES.manifest() == (DATA / "two_nodes.yaml").read_text()


def not_of_the_schema(given: Any, known: Any, path: str = "") -> Iterator[str]:
    """Where a manifest says what its schema does not know, or lacks what it requires.

    The schema's own reading, `known`, leaves unknown fields out, and gives those that are required and missing an
    empty value; other defaults are fine.
    """
    if isinstance(given, dict) and isinstance(known, dict):
        yield from (f"{path}.{name}: unknown" for name in given.keys() - known.keys())
        yield from (f"{path}.{name}: missing" for name in known.keys() - given.keys() if not known[name])
        for name in given.keys() & known.keys():
            yield from not_of_the_schema(given[name], known[name], f"{path}.{name}")
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for i, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from not_of_the_schema(one, other, f"{path}[{i}]")
    elif given != known:
        yield f"{path}: {given!r} is read as {known!r}"


def judged(manifest: dict[str, Any]) -> list[str]:
    """What a JobSet's schema has against a manifest. A wrong type is rejected by pydantic, with ValueError."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import (
        JobsetV1alpha2JobSet,
    )  # seconds, not for who collects

    known = JobsetV1alpha2JobSet.from_dict(manifest)
    assert known is not None
    return list(not_of_the_schema(manifest, known.to_dict()))


@pytest.mark.parametrize("job", [KUBERNETES, KubernetesJob()])
def test_manifest_is_of_the_schema(job: KubernetesJob) -> None:
    assert judged(yaml.safe_load(job.manifest())) == []


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda spec, _: spec["failurePolicy"].update(maxRestart=3), ".spec.failurePolicy.maxRestart: unknown"),
        (lambda _, pod: pod["containers"][0].update(port=[1]), "containers[0].port: unknown"),
        (lambda _, pod: pod["containers"][0].pop("name"), "containers[0].name: missing"),
        (lambda _, pod: pod["volumes"][0].update(emptyDir={"size": "1Gi"}), "volumes[0].emptyDir.size: unknown"),
        (lambda _, pod: pod.update(terminationGracePeriodSeconds="2m"), "Input should be a valid integer"),
        (lambda spec, _: spec["network"].update(enableDNSHostnames="of course"), "Input should be a valid boolean"),
    ],
)
def test_schema_rejects_what_a_cluster_would(fault: Callable[[Any, Any], object], says: str) -> None:
    """The check above can fail: each of these fields is wrong."""
    manifest = yaml.safe_load(KUBERNETES.manifest())
    spec = manifest["spec"]
    fault(spec, spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"])
    try:
        found = judged(manifest)
    except ValueError as error:
        found = [str(error)]
    assert any(says in each for each in found), found


@pytest.mark.parametrize("script", [SLURM.script(), SlurmJob().script(), KUBERNETES._command()])
def test_the_shell_can_read_what_is_written(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def tool(directory: Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run_script(directory: Path, script: str, srun: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A batch script run by bash, with stand-ins for SLURM's programs that write down how they are called."""
    tool(directory, "srun", f'printf "%s|" "$@" >> srun.log; {srun}')
    tool(directory, "scontrol", 'echo "$@" >> scontrol.log; [ "$1" != show ] || printf "n1\\nn2\\n"')
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NAME": "mine", "SLURM_JOB_NODELIST": "n[1-2]"}
    slurm |= {"SLURM_JOB_CPUS_PER_NODE": "32", "PATH": f"{directory}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash"], input=script, text=True, env=slurm | env, cwd=directory, capture_output=True, check=False
    )
    assert "command not found" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("srun", "code", "requeues"),
    [
        ("true", 0, False),
        ('touch "$STRETTO_REQUEUE"', 0, True),
        ('touch "$STRETTO_REQUEUE"; exit 143', 0, True),
        ("exit 138", 0, True),
        ("exit 75", 75, False),
        ("exit 143", 143, False),
        ("exit 1", 1, False),
    ],
)
def test_batch_script_requeues_on_the_mark(tmp_path: Path, srun: str, code: int, requeues: bool) -> None:
    """138 is a warning that came before Python could listen; 75 comes from ranks that another's failure has ended."""
    old = tmp_path / "mine-41234" / "requeue"  # of the start before
    old.parent.mkdir()
    old.touch()
    done = run_script(tmp_path, SlurmJob(train=TRAIN).script(), f'echo "$MASTER_ADDR:$MASTER_PORT"; {srun}')
    assert done.returncode == code, done.stderr
    assert done.stdout == "n1:11234\n"
    assert "python|-m|stretto|train|--auto-resume|--tp|2|--data|my text|" in (tmp_path / "srun.log").read_text()
    assert ("requeue 41234" in (tmp_path / "scontrol.log").read_text()) == requeues


def test_a_job_that_cannot_be_requeued_says_so(tmp_path: Path) -> None:
    script = SlurmJob().script().replace('scontrol requeue "$SLURM_JOB_ID"', "false")
    done = run_script(tmp_path, script, 'touch "$STRETTO_REQUEUE"')
    assert (done.returncode, "submit this script again" in done.stderr) == (75, True)


@pytest.mark.parametrize(
    ("on_nodes", "asked", "cpus"),
    [("32", None, 8), ("32(x3),10,64(x2)", None, 2), ("2", None, 1), ("32", "5", 5)],
)
def test_ranks_share_the_cpus_of_the_node_that_has_fewest(
    tmp_path: Path, on_nodes: str, asked: str | None, cpus: int
) -> None:
    env = {"SLURM_JOB_CPUS_PER_NODE": on_nodes} | ({"SLURM_CPUS_PER_TASK": asked} if asked else {})
    done = run_script(tmp_path, SlurmJob(gpus_per_node=4).script(), 'echo "$OMP_NUM_THREADS"', **env)
    assert done.stdout == f"{cpus}\n", done.stderr
    assert f"--cpus-per-task={cpus}|" in (tmp_path / "srun.log").read_text()


def test_each_rank_has_a_log_beside_that_of_the_job(tmp_path: Path) -> None:
    """The words behind the options of srun, run as the ranks would."""
    tool(tmp_path, "python", 'echo "$SLURM_PROCID: $*"')
    ranks = 'while [[ $1 == --* ]]; do shift; done; for SLURM_PROCID in 0 1 12; do export SLURM_PROCID; "$@"; done'
    done = run_script(tmp_path, SlurmJob(train=TRAIN, srun=("container-image=a b",)).script(), ranks)
    said = "-m stretto train --auto-resume --tp 2 --data my text\n"
    assert done.stdout == f"0: {said}", done.stderr
    for number in (1, 12):
        assert (tmp_path / "mine-41234" / f"rank-{number:05d}.log").read_text() == f"{number}: {said}"
    assert "--container-image=a b|bash|" in (tmp_path / "srun.log").read_text()


def options(job: SlurmJob) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in job.script().splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("time", "seconds", "warning"),
    [
        ("1", 60, "USR1@30"),
        ("0:30", 60, "USR1@30"),
        ("3:01", 240, "USR1@120"),
        ("3", 180, "USR1@90"),
        ("2:30:00", 9000, "USR1@120"),
        ("1-0", 86_400, "USR1@120"),
        ("1-2:30", 95_400, "USR1@120"),
        ("1-0:0:1", 86_460, "USR1@120"),
        ("0", None, None),
        ("unlimited", None, None),
        ("INFINITE", None, None),
    ],
)
def test_every_form_of_time_is_read_and_a_job_is_warned_within_it(
    time: str, seconds: int | None, warning: str | None
) -> None:
    """Catches: a warning that would come before the job begins."""
    assert limit_seconds(time) == seconds
    signals = [each.removeprefix("signal=") for each in options(SlurmJob(time=time)) if each.startswith("signal=")]
    assert signals == ([] if warning is None else [warning])


def test_lines_of_the_user_are_added_and_come_before_ours() -> None:
    free = ("qos=high", "--mem=0", "comment=two words", "signal=USR1@600", "exclusive=user", "hold")
    found = options(SlurmJob(sbatch=free))
    assert set(found) >= {"qos=high", "mem=0", "comment='two words'", "signal=USR1@600", "exclusive=user", "hold"}
    assert [each for each in found if each.startswith(("signal", "exclusive"))] == ["signal=USR1@600", "exclusive=user"]
    assert "exclusive" not in options(SlurmJob(exclusive=False))


def test_a_job_on_cpus_asks_for_no_gpus() -> None:
    """Catches: GPUs that a run on CPUs waits for and does not use."""
    assert "gpus-per-node=4" in options(SlurmJob(gpus_per_node=4))
    cpu = options(SlurmJob(gpus_per_node=4, device="cpu"))
    assert not any(each.startswith("gpus") for each in cpu)
    assert "ntasks-per-node=4" in cpu
    assert "nvidia.com/gpu" not in KubernetesJob(device="cpu").manifest()


@pytest.mark.parametrize("where", ["slurm", "k8s"])
@pytest.mark.parametrize(("device", "gpus"), [("cuda", True), ("cpu", False)])
def test_what_lies_on_the_cluster_is_not_looked_for_here(
    where: str, device: str, gpus: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a script that cannot be written where its data, tokenizer and directory are not."""
    there = ["--data", "/on/the/cluster", "--tokenizer", "/on/the/cluster/tokenizer.json", "--out", "/proc/run"]
    assert main([where, "--", *there, "--device", device]) == 0
    written = capsys.readouterr()
    assert ("gpus-per-node=8" in written.out or "nvidia.com/gpu: 8" in written.out) == gpus
    assert (written.err, "runs/" in written.out) == ("", False)


def test_a_script_without_a_directory_has_one_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: two scripts that go on with each other's run; words that Megatron's flags swallow."""
    sizes = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64"
    more = "--micro-batch-size 1 --lr 1e-3 --train-iters 9 --attention-dropout 0 --hidden-dropout 0"
    found = []
    for train in (["--tp", "2"], ["--pp", "2"], ["--tp", "2"], ["--megatron", *sizes.split(), *more.split()]):
        assert main(["slurm", "--name", "mine", "--", *train]) == 0
        found += re.findall(r"train --auto-resume --out (runs/mine-[0-9a-f]{8}) --[tpm]", capsys.readouterr().out)
    assert len(found) == 4
    assert found[0] == found[2] != found[1]
    assert main(["k8s", "--claim", "disk", "--", "--tp", "2"]) == 0
    assert re.search(r"--auto-resume --out /data/runs/stretto-[0-9a-f]{8} ", capsys.readouterr().out)


def test_pods_start_their_node_of_the_job(tmp_path: Path) -> None:
    """A pod that is started again goes on, as every start does where there is a checkpoint."""
    tool(tmp_path, "torchrun", 'printf "%s|" "$@"')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "1"}
    pod = yaml.safe_load(KUBERNETES.manifest())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    done = subprocess.run(pod["containers"][0]["command"], text=True, env=env, capture_output=True, check=True)
    assert "--nnodes|2|--node-rank|1|--nproc-per-node|4|" in done.stdout
    assert "--master-addr|stretto-node-0-0.stretto|" in done.stdout
    assert "-m|stretto|train|--auto-resume|--tp|2|--data|my text|" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["local", "x"], "how many processes?"),
        (["local"], "how many processes?"),
        (["slurm", "--nodes", "2", "--gpus-per-node", "4", "--", "--tp", "3"], "nproc % (tp*cp*pp) = 8 %"),
    ],
)
def test_rejections(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main(words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (SlurmJob, "nodes", 0),
        (SlurmJob, "time", "tomorrow"),
        (SlurmJob, "time", "1:2:3:4"),
        (SlurmJob, "time", "1-2-3"),
        (SlurmJob, "time", ""),
        (SlurmJob, "sbatch", ("nodes=3",)),
        (SlurmJob, "sbatch", ("two words",)),
        (SlurmJob, "srun", ("a=b\nrm",)),
        (SlurmJob, "cpus_per_task", 0),
        (SlurmJob, "name", "two words"),
        (KubernetesJob, "name", "Upper"),
        (KubernetesJob, "gpus_per_node", -1),
    ],
)
def test_values_that_no_cluster_takes(kind: type[SlurmJob | KubernetesJob], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}|is no option"):
        kind(**{field: value})  # type: ignore[arg-type]


def test_what_cannot_be_written_or_started_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a bare errno."""
    words = ["slurm", "--nodes", "2", "--", "--preset", "llama3-8b"]
    assert main([words[0], "--out", "/proc/job.sh", *words[1:]]) == 2
    assert capsys.readouterr().err == (
        "stretto launch slurm: --out /proc/job.sh cannot be written: No such file or directory\n"
    )
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([words[0], "--submit", *words[1:]]) == 2
    assert capsys.readouterr().err == (
        "stretto launch slurm: --submit: sbatch cannot be started here: No such file or directory\n"
    )


def test_writes_to_a_file_and_submits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tool(tmp_path, "sbatch", "head -n 2")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    out = tmp_path / "job.sbatch"
    assert main(["slurm", "--name", "mine", "--out", str(out), "--submit", "--", "--tp", "2"]) == 0
    assert "--job-name=mine" in out.read_text()
    assert capfd.readouterr().out == "#!/bin/bash\n#SBATCH --job-name=mine\n"


@pytest.mark.parametrize("where", ["slurm", "k8s"])
def test_help_has_all_options_of_its_own(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: --submit and --out read beside the options that --help is made of."""
    with pytest.raises(SystemExit) as ended:
        main([where, "--help"])
    assert ended.value.code == 0
    helped = capsys.readouterr().out
    for word in ("--nodes", "--out FILE", "--submit", "-- --tp 8"):
        assert word in helped
