"""Batch scripts and manifests: the files beside this one, their syntax, and what they do when a run ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from stretto.cli.launch import main
from stretto.launch.kubernetes import KubernetesJob
from stretto.launch.slurm import SlurmJob

pytestmark = pytest.mark.pure

DATA = Path(__file__).parent / "data"
TRAIN = ("--tp", "2", "--data", "my text")
SLURM = SlurmJob(
    nodes=2,
    gpus_per_node=4,
    partition="h100",
    account="lab",
    cpus_per_gpu=12,
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


@pytest.mark.parametrize(
    ("restarts", "ends_with", "resumes", "requeues"),
    [(None, 0, False, False), (None, 75, False, True), ("1", 0, True, False), ("2", 1, True, False)],
)
def test_batch_script_requeues_and_resumes(
    tmp_path: Path, restarts: str | None, ends_with: int, resumes: bool, requeues: bool
) -> None:
    """Run by bash, with stand-ins for SLURM's programs that write down how they are called."""
    tool(
        tmp_path,
        "srun",
        f'printf "%s|" "$@" >> {tmp_path}/srun.log; echo "$MASTER_ADDR:$MASTER_PORT"; exit {ends_with}',
    )
    tool(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log; [ "$1" != show ] || printf "n1\\nn2\\n"')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "n[1-2]"}
    env |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    script = SlurmJob(train=TRAIN).script()
    done = subprocess.run(["bash"], input=script, text=True, env=env, capture_output=True, check=False)
    assert done.returncode == ends_with, done.stderr
    assert done.stdout == "n1:11234\n"
    called = (tmp_path / "srun.log").read_text()
    assert "python|-m|stretto|train|--tp|2|--data|my text|" in called
    assert called.endswith("--auto-resume|") == resumes
    assert ("requeue 41234" in (tmp_path / "scontrol.log").read_text()) == requeues


@pytest.mark.parametrize(("restarts", "resumes"), [("0", False), ("3", True)])
def test_pods_start_their_node_of_the_job(tmp_path: Path, restarts: str, resumes: bool) -> None:
    tool(tmp_path, "torchrun", 'printf "%s|" "$@"')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "1", "RESTARTS": restarts}
    pod = yaml.safe_load(KUBERNETES.manifest())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    done = subprocess.run(pod["containers"][0]["command"], text=True, env=env, capture_output=True, check=True)
    assert "--nnodes|2|--node-rank|1|--nproc-per-node|4|" in done.stdout
    assert "--master-addr|stretto-node-0-0.stretto|" in done.stdout
    assert "-m|stretto|train|--tp|2|--data|my text|" in done.stdout
    assert done.stdout.endswith("--auto-resume|") == resumes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "usage:"),
        (["nowhere"], "usage:"),
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
        (SlurmJob, "name", "two words"),
        (KubernetesJob, "name", "Upper"),
        (KubernetesJob, "gpus_per_node", -1),
    ],
)
def test_values_that_no_cluster_takes(kind: type[SlurmJob | KubernetesJob], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})  # type: ignore[arg-type]


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
