"""The tracker writes what training logs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import mmhub_tensorboard


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_number_becomes_a_curve(tmp_path: Path) -> None:
    run = SimpleNamespace(folder=tmp_path)
    (tracker,) = mmhub_tensorboard.mmhub_train_callbacks(run=run)
    tracker.on_start(run)
    tracker.on_log(1, {"loss": 2.0, "valid/accuracy": 0.5, "note": "text is left out"})
    tracker.on_log(2, {"loss": 1.0})
    tracker.on_end(run)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]
    assert events.Tags()["scalars"] == ["train/loss", "valid/accuracy"]
