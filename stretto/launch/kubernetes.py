"""A Kubernetes manifest for a job: a JobSet with one pod per node, each with torchrun inside."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

import yaml

from stretto.arguments.setting import setting
from stretto.launch.job import WARNING_SECONDS, Job

PORT = 29500


@dataclass(frozen=True)
class KubernetesJob(Job):
    """Write a JobSet manifest (jobset.sigs.k8s.io) for Kubernetes."""

    image: str = setting("stretto:latest", "container image that has Stretto installed")
    namespace: str = setting("default", "that of Kubernetes")
    max_restarts: int = setting(10, "so often a failed job is started again", at_least=0)
    claim: str | None = setting(
        None, "a persistent volume claim, mounted at /data: where the run goes, unless --out names another directory"
    )
    shm: str = setting("16Gi", "size of /dev/shm, over which the ranks of a node talk")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise ValueError(
                f"name={self.name!r} cannot be the host name of a pod: at most 40 of a-z, 0-9 and '-', from a letter"
            )

    @property
    def directory(self) -> str:
        """As for any job, on the volume that outlives the pods."""
        return f"/data/{super().directory}" if self.claim else super().directory

    def manifest(self) -> str:
        """The text of the manifest."""
        body = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {
                "failurePolicy": {"maxRestarts": self.max_restarts},
                "network": {"enableDNSHostnames": True},
                "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": self._job()}}],
            },
        }
        text: str = yaml.dump(body, Dumper=_Readable, sort_keys=False, width=1000)
        return text

    def _job(self) -> dict[str, object]:
        return {
            "parallelism": self.nodes,
            "completions": self.nodes,
            "completionMode": "Indexed",
            "backoffLimit": 0,  # a pod cannot come back alone: the JobSet starts all of them again
            "template": {"spec": self._pod()},
        }

    def _pod(self) -> dict[str, object]:
        volumes: list[dict[str, object]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shm}}]
        mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
        if self.claim:
            volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": self.claim}})
            mounts.append({"name": "data", "mountPath": "/data"})
        return {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": WARNING_SECONDS,  # between SIGTERM and SIGKILL: time to save
            "containers": [
                {
                    "name": "ranks",
                    "image": self.image,
                    "command": ["bash", "-c", self._command()],
                    "ports": [{"containerPort": PORT}],
                    "resources": {"limits": {"nvidia.com/gpu": self.gpus_per_node} if self.device == "cuda" else {}},
                    "volumeMounts": mounts,
                }
            ],
            "volumes": volumes,
        }

    def _command(self) -> str:
        train = " ".join(shlex.quote(word) for word in self.train)
        return COMMAND.format(
            nodes=self.nodes,
            gpus=self.gpus_per_node,
            # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>, and the subdomain is the jobset's name
            host=f"{self.name}-node-0-0.{self.name}",
            port=PORT,
            train=train,
        )


COMMAND = """\
# With --auto-resume, pods that are started again go on from the newest complete checkpoint.
exec torchrun --nnodes {nodes} --node-rank "$JOB_COMPLETION_INDEX" --nproc-per-node {gpus} \\
    --master-addr {host} --master-port {port} -m stretto train --auto-resume {train}
"""


class _Readable(yaml.SafeDumper):
    """Writes text of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _text)
