"""A run that stops, in whatever way, goes on to the same bytes as one that did not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmhub.config import check_recipe, dump_recipe
from mmhub.engine import train
from mmhub.engine.report import Reporter
from mmhub.errors import Interrupted, TrustError, UsageError
from tests.conftest import recipe

STEPS = 12  # two epochs of six batches


def noisy(tables: Path, **options: Any) -> dict[str, Any]:
    """A recipe with everything random that a step can be: augmentation, dropout, modality dropout, shuffling."""
    table = recipe(tables, epochs=2, eval_every=4, checkpoint_every=5, log_every=2, **options)
    table["model"]["encoders"]["image"]["config"]["augment"] = "strong"
    table["model"]["fusion"]["config"] |= {"dropout": 0.2, "modality_dropout": 0.3}
    table["model"]["decoder"] = {"use": "classification", "config": {"dropout": 0.2}}
    return table


def weights(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "speed")} for line in found]


def checkpoints(out: Path) -> list[str]:
    """Everything but links in the folder of checkpoints."""
    return sorted(path.name for path in (out / "checkpoints").iterdir() if not path.is_symlink())


@pytest.fixture(scope="module")
def whole(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    return train(noisy(tables), tmp_path_factory.mktemp("whole") / "run").out


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, signals: tuple[int, ...] = (signal.SIGINT,)) -> None:
    """Send this process signals in the middle of an optimizer step."""
    count = 0
    real = Reporter.step

    def on_step(self: Reporter, loss: float) -> None:
        nonlocal count
        count += 1
        real(self, loss)
        if count == step:
            for number in signals:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Reporter, "step", on_step)


@pytest.mark.parametrize("step", [1, 6, 8, STEPS])  # the first, an epoch's end, mid-epoch with an evaluation, the last
def test_a_run_interrupted_by_ctrl_c_ends_in_the_same_bytes(
    tables: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted, match=f"interrupted at step {step}; saved") as caught:
            train(noisy(tables), tmp_path / "run")
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler is put back"
    result = train(noisy(tables), tmp_path / "run", resume=True)
    assert result.steps == STEPS
    assert weights(tmp_path / "run") == weights(whole)
    assert lines(tmp_path / "run") == lines(whole)


def test_sigterm_saves_and_exits_with_143(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 2, (signal.SIGTERM,))
    with pytest.raises(Interrupted, match="terminated at step 2; saved") as caught:
        train(noisy(tables), tmp_path / "run")
    assert caught.value.exit_code == 143
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").exists()


def test_a_second_ctrl_c_stops_at_once_and_leaves_nothing_half_written(
    tables: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 7, (signal.SIGINT, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(noisy(tables), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-00000005"]
    train(noisy(tables), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole)


def test_accumulation_goes_on_at_the_right_batch(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = noisy(tables, accumulate=4)
    train(table, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Interrupted):
            train(table, tmp_path / "run")
    train(table, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def killed_run(tables: Path, folder: Path, checkpoint: str) -> Path:
    """Start `mmhub train` in a process of its own and kill it right after a checkpoint appears."""
    (folder / "r.toml").write_text(dump_recipe(check_recipe(noisy(tables))))
    code = (
        "import os\nfrom mmhub.engine.state import Checkpoints\nreal = Checkpoints.save\n"
        "def save(self, *args, **options):\n    real(self, *args, **options)\n    self.wait()\n"
        f"    if (self.folder / {checkpoint!r}).exists():\n"
        "        (self.folder / '.step-00000099.7.tmp').mkdir()\n        os.kill(os.getpid(), 9)\n"
        "Checkpoints.save = save\nfrom mmhub.cli.main import main\n"
        f"main(['train', {str(folder / 'r.toml')!r}, '--out', {str(folder / 'run')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_a_run_killed_after_a_checkpoint_ends_in_the_same_bytes(tables: Path, whole: Path, tmp_path: Path) -> None:
    run = killed_run(tables, tmp_path, "step-00000005")
    train(tmp_path / "r.toml", run, resume=True)
    assert weights(run) == weights(whole)
    assert lines(run) == lines(whole)
    assert checkpoints(run) == ["step-00000010", f"step-{STEPS:08}"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(
    tables: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    newest = run / "checkpoints" / f"step-{STEPS:08}"
    spoil(newest, damage)
    result = train(noisy(tables), run, resume=True)
    assert result.steps == STEPS
    assert weights(run) == weights(whole)
    output = capsys.readouterr()
    assert f"checkpoint step-{STEPS:08} is damaged" in output.err
    assert output.out == ""


def spoil(checkpoint: Path, damage: str) -> None:
    path = checkpoint / "state.safetensors"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "remove":
        path.unlink()
    else:
        (checkpoint / "manifest.json").write_text("{")


def test_when_all_checkpoints_are_damaged_nothing_is_touched(tables: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        spoil(checkpoint, "flip")
    before = snapshot(run)
    with pytest.raises(TrustError, match="all checkpoints"):
        train(noisy(tables), run, resume=True)
    assert snapshot(run) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("train", "learning_rate", 1e-5), ("train", "batch_size", 4), ("data", "on_error", "skip"), ("", "seed", 3)],
)
def test_resuming_with_another_recipe_is_refused(
    tables: Path, whole: Path, tmp_path: Path, part: str, key: str, value: Any
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    before = snapshot(run)
    table = noisy(tables)
    (table[part] if part else table)[key] = value
    with pytest.raises(UsageError, match=part or "seed") as caught:
        train(table, run, resume=True)
    assert "differs from the recipe" in caught.value.message
    assert snapshot(run) == before


def test_what_changes_no_result_may_differ_on_resuming(tables: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    table = noisy(tables) | {"card": {"license": "mit"}}
    table["train"] |= {"checkpoint_every": 3, "keep": 1, "log_every": 1}
    train(table, run, resume=True)
    assert weights(run) == weights(whole)
    assert "license: mit" in (run / "model" / "README.md").read_text()


def test_resuming_over_a_table_of_another_length_is_refused(tables: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = noisy(tables)
    table["data"]["train"] = str(shutil.copy(tables / "train.parquet", tmp_path / "train.parquet"))
    train(table, tmp_path / "run")
    pq.write_table(pq.read_table(tmp_path / "train.parquet").slice(0, 40), tmp_path / "train.parquet")
    with pytest.raises(UsageError, match="has 40 rows, and 48 when"):
        train(table, tmp_path / "run", resume=True)


def test_resuming_from_nothing_starts(tables: Path, whole: Path, tmp_path: Path) -> None:
    train(noisy(tables), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole)


def test_a_folder_that_is_no_run_is_not_resumed_into(tables: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="no run folder"):
        train(noisy(tables), tmp_path, resume=True)
    assert snapshot(tmp_path) == {"thesis.txt": b"mine"}


def test_resuming_a_finished_run_changes_nothing_of_its_model(tables: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    train(noisy(tables), run, resume=True)
    assert weights(run) == weights(whole)
    assert lines(run) == lines(whole)


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_is_resumable(tables: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(dump_recipe(check_recipe(noisy(tables))))
    command = [sys.executable, "-m", "mmhub", "train", "r.toml", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "error: interrupted at step" in err
    done = subprocess.run([*command, "--resume", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == STEPS
    assert weights(tmp_path / "run") == weights(whole)
