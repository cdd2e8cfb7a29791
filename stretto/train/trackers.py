"""Listeners for experiment trackers; each needs its package, an extra of Stretto's: `pip install 'stretto[wandb]'`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from stretto.train.record import EvalRecord, Listener, RunRecord, StepRecord, figures


class Tracker(Listener):
    """Tells a server of a run. One that cannot be reached at the start is an error; later the run goes on without."""

    _lost = False

    def _try(self, tell: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            tell()
        except Exception as error:  # noqa: BLE001  # of any kind: each package has its own for a server that is gone
            self._lost = True
            said = f"{error}".partition("\n")[0] or type(error).__name__
            logging.getLogger(__name__).warning("no more figures for %s: %s", type(self).__name__, said)


class WandB(Tracker):
    """Curves in Weights & Biases; `options` go to `wandb.init`. `WANDB_MODE=offline` needs no network."""

    def __init__(self, project: str, **options: Any) -> None:
        self._wandb, self._project, self._options = package("wandb"), project, options
        self._run: Any = None

    def started(self, run: RunRecord) -> None:
        self._run = self._wandb.init(project=self._project, config=dict(run.about), **self._options)

    def stepped(self, record: StepRecord) -> None:
        self._try(lambda: self._run.log(figures(record), step=record.step))

    def evaluated(self, record: EvalRecord) -> None:
        self._try(lambda: self._run.log(figures(record), step=record.step))

    def close(self) -> None:
        if self._run is not None:
            self._try(self._run.finish)


class MLflow(Tracker):
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
        self._log(record)

    def evaluated(self, record: EvalRecord) -> None:
        self._log(record)

    def _log(self, record: StepRecord | EvalRecord) -> None:
        run, step = self._run.info.run_id, record.step
        self._try(lambda: [self._client.log_metric(run, *each, step=step) for each in figures(record).items()])

    def close(self) -> None:
        if self._run is not None:
            self._try(lambda: self._client.set_terminated(self._run.info.run_id))


def package(name: str) -> Any:
    """The package of a tracker. Raises ModuleNotFoundError, with what to install, where it is not there."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} is not installed here: pip install 'stretto[{name}]'") from error
