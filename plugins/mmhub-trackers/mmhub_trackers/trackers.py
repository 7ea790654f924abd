"""One class a tracker: each sends the recipe once, numbers by step, and goes on with the same run after a resume.

What identifies a run at a tracker stands in `trackers.json` of the run folder. Each library is imported in `on_start`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

_PATIENCE = 60.0  # seconds for which the end of a run waits for a tracker
_PROJECT = "mmhub"  # where a tracker wants a project and its own variable names none


class WandbTracker:
    """Weights & Biases: https://docs.wandb.ai. Without a login, and with WANDB_MODE=offline, it writes files only."""

    def __init__(self) -> None:
        self._outer = sys.exception()

    def on_start(self, run: Any) -> None:
        import wandb

        login = getattr(getattr(wandb, "api", None), "api_key", None)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.folder.name,
            id=_identity(run.folder, "wandb", _new),
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
            mode=os.environ.get("WANDB_MODE") or (None if login else "offline"),
        )
        # A resumed run goes back to its checkpoint, and wandb's own step count does not go back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(_numbers(metrics) | {"step": step})

    def on_end(self, run: Any) -> None:
        code = int(_failed(self._outer))
        _bounded("wandb", lambda: self._run.finish(exit_code=code))


class MLflowTracker:
    """MLflow: https://mlflow.org; the server is what MLFLOW_TRACKING_URI names, else files of this machine."""

    def __init__(self) -> None:
        self._outer = sys.exception()

    def on_start(self, run: Any) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a dead server would hold training for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds
        from mlflow import MlflowClient

        self._client = MlflowClient()
        known = _identities(run.folder).get("mlflow")
        self._id = _identity(run.folder, "mlflow", lambda: self._create(run))
        if known:
            self._client.update_run(self._id, status="RUNNING")

    def on_log(self, step: int, metrics: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step) for name, value in _numbers(metrics).items()]
        self._client.log_batch(self._id, metrics=batch)

    def on_end(self, run: Any) -> None:
        self._client.set_terminated(self._id, status="KILLED" if _failed(self._outer) else "FINISHED")

    def _create(self, run: Any) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        made = self._client.create_run(place, run_name=run.folder.name)
        values = [Param(key, str(value)[:500]) for key, value in _flat(run.config)]
        for start in range(0, len(values), 100):  # the most that one request may hold
            self._client.log_batch(made.info.run_id, params=values[start : start + 100])
        return str(made.info.run_id)


class TrackioTracker:
    """Trackio: https://huggingface.co/docs/trackio; TRACKIO_SPACE_ID sends it to a Space, else it stays here."""

    def on_start(self, run: Any) -> None:
        import trackio

        self._trackio = trackio
        with redirect_stdout(sys.stderr):  # on stdout are results alone
            trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
                name=_identity(run.folder, "trackio", lambda: f"{run.folder.name}-{_new()}"),
                space_id=os.environ.get("TRACKIO_SPACE_ID"),
                config=dict(run.config),
                resume="allow",
            )

    def on_log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._trackio.log(_numbers(metrics), step=step)

    def on_end(self, run: Any) -> None:
        with redirect_stdout(sys.stderr):
            _bounded("trackio", self._trackio.finish)


TRACKERS = {"wandb": WandbTracker, "mlflow": MLflowTracker, "trackio": TrackioTracker}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        elif value not in ("", None, []):
            yield f"{above}{key}", value


def _failed(outer: BaseException | None) -> bool:
    """Whether an exception ends the run, such as an interruption, and not one that the caller was dealing with."""
    error = sys.exception()
    return error is not None and error is not outer


def _bounded(name: str, finish: Callable[[], Any]) -> None:
    """Finish sending, but do not let a server that does not answer hold the end of a run for long.

    Raises:
        TimeoutError: it took too long; the thread is left behind, and what was not sent stays in the run folder.
    """
    failed: list[BaseException] = []

    def work() -> None:
        try:
            finish()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name=f"{name} finish", daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        raise TimeoutError(f"{name} did not finish in {_PATIENCE:.0f} s")
    if failed:
        raise failed[0]


def _new() -> str:
    return uuid.uuid4().hex[:8]


def _identities(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / "trackers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _identity(folder: Path, tracker: str, make: Any) -> str:
    """The name under which a tracker knows the run in `folder`; made by `make` when it has none."""
    known = _identities(folder)
    if tracker not in known:
        known[tracker] = make()
        (folder / "trackers.json").write_text(json.dumps(known) + "\n", encoding="utf-8")
    return str(known[tracker])
