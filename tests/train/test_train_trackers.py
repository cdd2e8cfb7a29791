"""Weights & Biases and MLflow, the real packages, offline: what arrives there is what was told.

Each test names the fault that it catches.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from stretto.train import trackers
from stretto.train.record import EvalRecord, Listener, RunRecord, StepRecord

pytestmark = pytest.mark.gloo


def tell(listener: Listener) -> None:
    listener.started(RunRecord(2, about={"preset": "tiny"}))
    for n in (1, 2):
        listener.stepped(StepRecord(n, 1.5 / n, 2.0, 1e-3, 64 * n, 10.0, ms_per_step=5.0))
    listener.evaluated(EvalRecord(2, 3.0, 4.25))


@pytest.mark.filterwarnings("ignore")  # of what these packages bring along
def test_mlflow_has_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: names that MLflow rejects, steps that are lost, a run that never ends."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}"
    for _ in range(2):
        listener = trackers.MLflow("piano", tracking_uri=uri)
        tell(listener)
        listener.close()
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("piano").experiment_id])
    assert [(run.info.status, run.data.params) for run in runs] == [("FINISHED", {"preset": "tiny"})] * 2
    history = client.get_metric_history(runs[0].info.run_id, "loss/train")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.5), (2, 0.75)]
    assert runs[0].data.metrics["bits_per_byte/held_out"] == 4.25


@pytest.mark.filterwarnings("ignore")
def test_wandb_has_the_curves(tmp_path: Path) -> None:
    """Catches: steps out of order, which it drops, and figures that are not logged."""
    wandb = pytest.importorskip("wandb")
    listener = trackers.WandB("piano", mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    tell(listener)
    listener.close()
    (file,) = tmp_path.rglob("run-*.wandb")  # kept for `wandb sync`; written by a process of wandb's
    expected = (("loss/train", "1.5"), ("loss/train", "0.75"), ("bits_per_byte/held_out", "4.25"), ("preset", '"tiny"'))
    patterns = [re.compile(rf"{name}.{{1,4}}{value}".encode(), re.DOTALL) for name, value in expected]
    end = time.monotonic() + 30
    while missing := [each.pattern for each in patterns if not each.search(file.read_bytes())]:
        assert time.monotonic() < end, (missing, file.read_bytes())
        time.sleep(0.1)


@pytest.mark.parametrize("kind", [trackers.WandB, trackers.MLflow])
def test_a_run_goes_on_without_a_server(kind: type[Listener], caplog: pytest.LogCaptureFixture) -> None:
    """Catches: weeks of training that end with a tracker's server; and a word, or a wait, for each step after that."""

    class Gone:
        asked = 0
        info = property(lambda self: self)
        run_id = "piano"

        def log(self, *_: object, **__: object) -> None:
            Gone.asked += 1
            raise ConnectionError("no route to host")

        log_metric = finish = set_terminated = log

    listener: Any = kind.__new__(kind)
    listener._run = listener._client = Gone()
    for n in (1, 2):
        listener.stepped(StepRecord(n, 1.5, 2.0, 1e-3, 64, 10.0))
    listener.evaluated(EvalRecord(2, 3.0, 4.25))
    listener.close()
    said = [record.getMessage() for record in caplog.records]
    assert (said, Gone.asked) == ([f"no more figures for {kind.__name__}: no route to host"], 1)


def test_a_missing_package_is_named_with_what_to_install() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stretto\[aim\]'"):
        trackers.package("aim")
