"""Trackers get the recipe and every number by its step, only if asked for, and go on with the same run."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

import mmhub_trackers

CONFIG = {"task": "classification", "train": {"epochs": 2, "compile": "off"}, "model": {"base": ""}}
METRICS = {"loss": 2.0, "valid/accuracy": 0.5, "note": "text is left out"}


class Recorder:
    """Stands for anything of a library: remembers how it was called."""

    def __init__(self, answer: Any = None) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.answer


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def start(folder: Path, ends: BaseException | None = None) -> Any:
    """One session of training in `folder`."""
    run = SimpleNamespace(folder=folder, config=CONFIG, total_steps=2)
    (tracker,) = mmhub_trackers.mmhub_train_callbacks(run=run)
    tracker.on_start(run)
    tracker.on_log(1, METRICS)
    try:
        if ends:
            raise ends
    except BaseException:
        tracker.on_end(run)
    else:
        tracker.on_end(run)
    return tracker


def test_nothing_is_tracked_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMHUB_TRACKERS", raising=False)
    fake(monkeypatch, "wandb")
    assert mmhub_trackers.mmhub_train_callbacks(run=SimpleNamespace(folder=tmp_path)) == []


def test_what_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MMHUB_TRACKERS", "wandb, neptune,")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(mmhub_trackers, "find_spec", lambda name: None)
    assert mmhub_trackers.mmhub_train_callbacks(run=SimpleNamespace(folder=tmp_path)) == []
    said = capsys.readouterr().err
    assert "wandb, which is not installed: pip install 'mmhub-trackers[wandb]'" in said
    assert "'neptune'; known are wandb, mlflow, trackio" in said


def test_wandb_gets_numbers_by_step_and_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MMHUB_TRACKERS", "wandb")
    run = SimpleNamespace(log=Recorder(), finish=Recorder(), define_metric=Recorder())
    init = Recorder(run)
    fake(monkeypatch, "wandb", init=init, api=SimpleNamespace(api_key=None))
    start(tmp_path)
    start(tmp_path)
    first, second = (kwargs for _, kwargs in init.calls)
    assert first["id"] == second["id"]
    assert first["config"] == CONFIG
    assert (first["name"], first["project"], first["resume"]) == (tmp_path.name, "mmhub", "allow")
    assert first["mode"] == "offline", "there is no login"
    assert run.log.calls[0][0] == ({"loss": 2.0, "valid/accuracy": 0.5, "step": 1},)
    assert (("*",), {"step_metric": "step"}) in run.define_metric.calls
    assert run.finish.calls[0][1] == {"exit_code": 0}
    monkeypatch.setattr(sys.modules["wandb"], "api", SimpleNamespace(api_key="key"))
    start(tmp_path / ".." / tmp_path.name)
    assert init.calls[-1][1]["mode"] is None


def test_an_interrupted_run_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMHUB_TRACKERS", "wandb")
    run = SimpleNamespace(log=Recorder(), finish=Recorder(), define_metric=Recorder())
    fake(monkeypatch, "wandb", init=Recorder(run))
    start(tmp_path, ends=KeyboardInterrupt())
    assert run.finish.calls == [((), {"exit_code": 1})]


def test_an_exception_that_the_caller_deals_with_is_not_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMHUB_TRACKERS", "wandb")
    run = SimpleNamespace(log=Recorder(), finish=Recorder(), define_metric=Recorder())
    fake(monkeypatch, "wandb", init=Recorder(run))
    try:
        raise ValueError("something before")
    except ValueError:
        start(tmp_path)
    assert run.finish.calls == [((), {"exit_code": 0})]


def test_a_server_that_does_not_answer_does_not_hold_the_end_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMHUB_TRACKERS", "wandb")
    monkeypatch.setattr("mmhub_trackers.trackers._PATIENCE", 0.1)
    answer = threading.Event()
    run = SimpleNamespace(log=Recorder(), finish=lambda exit_code: answer.wait(20), define_metric=Recorder())
    fake(monkeypatch, "wandb", init=Recorder(run))
    try:
        with pytest.raises(TimeoutError, match="wandb did not finish"):
            start(tmp_path)
    finally:
        answer.set()


class Client:
    """MLflow's client, as far as it is used."""

    made: ClassVar[list[tuple[Any, ...]]] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        return f"experiment {name}"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.made.append(("create", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def update_run(self, run: str, status: str) -> None:
        self.made.append(("update", run, status))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        self.made.append(("log", run, *metrics, *params))

    def set_terminated(self, run: str, status: str) -> None:
        self.made.append(("end", run, status))


def test_mlflow_gets_parameters_once_and_numbers_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMHUB_TRACKERS", "MLflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setattr(Client, "made", [])
    fake(monkeypatch, "mlflow", MlflowClient=Client)
    fake(
        monkeypatch,
        "mlflow.entities",
        Metric=lambda name, value, time, step: (name, value, step),
        Param=lambda name, value: (name, value),
    )
    start(tmp_path)
    start(tmp_path)
    parameters = ("task", "classification"), ("train.epochs", "2"), ("train.compile", "off")
    numbers = ("loss", 2.0, 1), ("valid/accuracy", 0.5, 1)
    assert Client.made == [
        ("create", "experiment mmhub", tmp_path.name),
        ("log", "r1", *parameters),
        ("log", "r1", *numbers),
        ("end", "r1", "FINISHED"),
        ("update", "r1", "RUNNING"),
        ("log", "r1", *numbers),
        ("end", "r1", "FINISHED"),
    ]


def test_trackio_gets_numbers_by_step_and_the_same_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TRACKIO_PROJECT", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MMHUB_TRACKERS", "trackio")
    init, log, finish = Recorder(), Recorder(), Recorder()
    fake(monkeypatch, "trackio", init=lambda **kwargs: print("hello", init(**kwargs)), log=log, finish=finish)
    start(tmp_path)
    start(tmp_path)
    assert capsys.readouterr().out == "", "on stdout are results alone"
    first, second = (kwargs for _, kwargs in init.calls)
    assert first == second
    assert first["name"].startswith(f"{tmp_path.name}-")
    assert (first["project"], first["resume"], first["config"]) == ("mmhub", "allow", CONFIG)
    assert log.calls[0] == (({"loss": 2.0, "valid/accuracy": 0.5},), {"step": 1})
    assert len(finish.calls) == 2


def test_several_trackers_share_the_file_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(log=Recorder(), finish=Recorder(), define_metric=Recorder())
    fake(monkeypatch, "wandb", init=Recorder(run))
    fake(monkeypatch, "trackio", init=Recorder(), log=Recorder(), finish=Recorder())
    for name in ("wandb", "trackio"):
        monkeypatch.setenv("MMHUB_TRACKERS", name)
        start(tmp_path)
    assert set(json.loads((tmp_path / "trackers.json").read_text())) == {"wandb", "trackio"}
