"""Listeners for experiment trackers; each needs its package, an extra of Stretto's: `pip install 'stretto[wandb]'`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from stretto.train.record import EvalRecord, Listener, RunRecord, StepRecord, figures


class WandB(Listener):
    """Curves in Weights & Biases; `options` go to `wandb.init`. `WANDB_MODE=offline` needs no network."""

    def __init__(self, project: str, **options: Any) -> None:
        self._wandb, self._project, self._options = package("wandb"), project, options
        self._run: Any = None

    def started(self, run: RunRecord) -> None:
        self._run = self._wandb.init(project=self._project, config=dict(run.about), **self._options)

    def stepped(self, record: StepRecord) -> None:
        self._run.log(figures(record), step=record.step)

    def evaluated(self, record: EvalRecord) -> None:
        self._run.log(figures(record), step=record.step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class MLflow(Listener):
    """Curves in MLflow, at `tracking_uri` or where MLFLOW_TRACKING_URI says."""

    def __init__(self, experiment: str, *, tracking_uri: str | None = None) -> None:
        self._experiment = experiment
        self._run: Any = None
        self._client: Any = package("mlflow").MlflowClient(tracking_uri)

    def started(self, run: RunRecord) -> None:
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        self._run = self._client.create_run(experiment)
        for name, value in run.about.items():
            self._client.log_param(self._run.info.run_id, name, value)

    def stepped(self, record: StepRecord) -> None:
        for name, value in figures(record).items():
            self._client.log_metric(self._run.info.run_id, name, value, step=record.step)

    def evaluated(self, record: EvalRecord) -> None:
        for name, value in figures(record).items():
            self._client.log_metric(self._run.info.run_id, name, value, step=record.step)

    def close(self) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run.info.run_id)


def package(name: str) -> Any:
    """The package of a tracker. Raises ModuleNotFoundError, with what to install, where it is not there."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} is not installed here: pip install 'stretto[{name}]'") from error
