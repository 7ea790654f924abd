"""The training engine: it learns, reports, stops on its own, and survives bad data, full disks and failing trackers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmhub.checkpoint import load, read_config, verify_files
from mmhub.config import check_recipe
from mmhub.engine import loop, report, state, train
from mmhub.errors import InputError, MmhubError, UsageError
from mmhub.optim import learning_rate_factor
from tests.conftest import make_table, png, recipe


def image_only(tables: Path, **options: Any) -> dict[str, Any]:
    """A smaller recipe without anything random in a step."""
    table = recipe(tables, **options)
    del table["model"]["encoders"]["audio"]
    table["model"]["encoders"]["image"]["config"]["augment"] = "none"
    table["model"]["fusion"]["config"] |= {"dropout": 0.0, "modality_dropout": 0.0}
    table["model"]["decoder"] = {"use": "classification", "config": {"dropout": 0.0}}
    table["data"]["inputs"] = {"image": "image"}
    table["data"]["train"] = table["data"]["valid"]
    return table


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoints(out: Path) -> list[str]:
    """Everything but links in the folder of checkpoints."""
    return sorted(path.name for path in (out / "checkpoints").iterdir() if not path.is_symlink())


def test_training_learns_the_task_and_leaves_a_described_checkpoint(tables: Path, tmp_path: Path) -> None:
    table = recipe(tables, epochs=8, log_every=6) | {"card": {"license": "mit", "summary": "Squares and tones."}}
    table["model"]["encoders"]["image"]["config"]["augment"] = "none"  # the place of the square is the label
    result = train(table, tmp_path / "run")
    assert result.steps == 48
    assert result.metrics["accuracy"] == 1.0
    assert result.out == tmp_path / "run"
    found = lines(tmp_path / "run")
    losses = [line["loss"] for line in found if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert {path.name for path in result.model.iterdir()} == {
        "README.md", "config.json", "provenance.json", "eval", "model.safetensors",
    }  # fmt: skip
    verify_files(result.model, read_config(result.model))
    measured = json.loads((result.model / "eval" / "classification.json").read_text())
    assert measured["metrics"] == result.metrics
    assert set(measured["subsets"]) == {"image", "audio", "image+audio"}
    assert measured["data"] == "valid.parquet"
    facts = json.loads((result.model / "provenance.json").read_text())
    assert (facts["steps"], facts["seed"], facts["data"]["train"]["rows"]) == (48, 0, 48)
    assert str(tables) not in json.dumps(facts), "no path of this machine is published"
    card = (result.model / "README.md").read_text()
    assert "license: mit" in card
    assert "Squares and tones." in card
    assert result.load().predict({"image": str(_image(tmp_path))})[0]["label"] == "c2"


def _image(folder: Path) -> Path:
    (folder / "2.png").write_bytes(png(2))
    return folder / "2.png"


def test_metrics_hold_step_epoch_loss_rate_norm_and_validation(tables: Path, tmp_path: Path) -> None:
    train(image_only(tables, epochs=2, log_every=1), tmp_path / "run")
    found = lines(tmp_path / "run")
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["epoch"] for line in steps] == [0.5, 1.0, 1.5, 2.0]
    assert set(steps[0]) == {"step", "epoch", "loss", "learning_rate", "gradient_norm", "seconds", "speed"}
    assert steps[0]["speed"]["samples_per_second"] > 0
    assert [line["step"] for line in found if "valid" in line] == [2, 4]
    assert set(found[-1]["valid"]) == {"accuracy", "f1", "ece", "loss"}


def test_a_run_of_one_epoch_is_validated_and_logged_too(tables: Path, tmp_path: Path) -> None:
    result = train(image_only(tables), tmp_path / "run")
    assert lines(tmp_path / "run")[-1]["valid"]["accuracy"] == result.metrics["accuracy"]


def test_two_accumulated_batches_of_4_are_one_batch_of_8(tables: Path, tmp_path: Path) -> None:
    """Up to batch statistics, hence a backbone without batch norm."""
    scores = []
    for name, options in (("whole", {"batch_size": 8}), ("parts", {"batch_size": 4, "accumulate": 2})):
        table = image_only(tables, epochs=2, log_every=1, **options)
        table["model"]["encoders"]["image"]["config"]["architecture"] = "test_vit"
        result = train(table, tmp_path / name)
        assert result.steps == 4
        scores.append(list(result.load().predict({"image": png(1)})[0]["scores"].values()))
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)  # Adam turns rounding in tiny gradients into steps
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_smaller_last_batch_weighs_by_its_rows(tables: Path, tmp_path: Path) -> None:
    table = image_only(tables, batch_size=6, accumulate=3)  # 16 rows: 6 + 6 + 4 in one step
    assert train(table, tmp_path / "run").steps == 1
    whole = train(image_only(tables, batch_size=16, log_every=1), tmp_path / "whole")
    assert whole.steps == 1


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_does_not(tables: Path, tmp_path: Path) -> None:
    table = recipe(tables, max_steps=3)
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(seed + 17)  # what went on before in the process is of no matter
        train(table | {"seed": seed}, tmp_path / name)
        contents.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_worker_processes_change_no_result(tables: Path, tmp_path: Path) -> None:
    contents = []
    for workers in (0, 2):
        table = recipe(tables, max_steps=3)
        table["data"]["workers"] = workers
        train(table, tmp_path / str(workers))
        contents.append((tmp_path / str(workers) / "model" / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_the_learning_rate_warms_up_and_falls_to_its_minimum() -> None:
    options = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup": 0.2}
    table = check_recipe({"task": "classification", "train": options})
    rates = [learning_rate_factor(step, 10, table) for step in range(11)]
    assert rates[0] == pytest.approx(1 / 3)
    assert rates[2] == pytest.approx(1.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[10] == pytest.approx(0.1)
    constant = check_recipe({"task": "classification", "train": {"schedule": "constant", "warmup": 2}})
    assert [learning_rate_factor(step, 10, constant) for step in (0, 1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


# -- stopping ---------------------------------------------------------------------------------------------------


def test_patience_stops_a_run_that_no_longer_improves_and_keeps_the_best(tables: Path, tmp_path: Path) -> None:
    table = image_only(tables, epochs=9, patience=2, learning_rate=0.0)
    result = train(table, tmp_path / "run")
    assert result.steps == 6  # best after epoch 1, then two without gain
    assert [line["step"] for line in lines(tmp_path / "run") if "valid" in line] == [2, 4, 6]


def test_a_run_without_validation_data_keeps_its_last_model(tables: Path, tmp_path: Path) -> None:
    table = image_only(tables)
    del table["data"]["valid"]
    result = train(table, tmp_path / "run")
    assert result.metrics == {}
    assert not (result.model / "eval").exists()
    assert load(result.model).task.name == "classification"


def test_a_fraction_of_the_rows_can_validate(tables: Path, tmp_path: Path) -> None:
    table = image_only(tables)
    del table["data"]["valid"]
    table["data"]["valid_fraction"] = 0.25
    result = train(table, tmp_path / "run")
    assert json.loads((result.model / "eval" / "classification.json").read_text())["rows"] == 4
    facts = json.loads((result.model / "provenance.json").read_text())
    assert (facts["data"]["train"]["rows"], facts["data"]["valid"]["rows"]) == (12, 4)


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(tables: Path, tmp_path: Path) -> None:
    table = image_only(tables)
    del table["data"]["valid"]
    table["data"]["valid_fraction"] = 0.99
    with pytest.raises(UsageError, match="leaves no training rows"):
        train(table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_the_newest_checkpoints_are_kept(tables: Path, tmp_path: Path) -> None:
    train(image_only(tables, epochs=3, checkpoint_every=1, keep=3), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-00000004", "step-00000005", "step-00000006"]
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-00000006"


# -- NaN --------------------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the loss of one training batch NaN."""
    from mmhub_heads.classification import Classification

    real, count = Classification.forward, 0

    def forward(self: Any, bundle: Any, targets: Any = None) -> Any:
        nonlocal count
        output = real(self, bundle, targets)
        if self.training:
            count += 1
            if count == step:
                output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(Classification, "forward", forward)


def test_a_nan_loss_stops_names_step_and_rows_and_keeps_what_was_good(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 4)
    with pytest.raises(MmhubError) as caught:
        train(image_only(tables, epochs=3, checkpoint_every=1), tmp_path / "run")
    assert caught.value.exit_code == 1
    assert "the loss is nan at step 4 (epoch 2, batch: valid.parquet row " in caught.value.message
    assert "and 4 more" in caught.value.message
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").exists()
    assert not (tmp_path / "run" / "checkpoints" / "step-00000004").exists()
    model = load(tmp_path / "run" / "model")  # the best so far, of step 2
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())


def test_a_learning_rate_that_blows_up_is_reported(tables: Path, tmp_path: Path) -> None:
    with pytest.raises(MmhubError, match=r"(loss|norm) is (nan|inf)") as caught:
        train(image_only(tables, learning_rate=1e30, warmup=0, epochs=2), tmp_path / "run")
    assert "learning_rate" in str(caught.value.hint)
    assert not (tmp_path / "run" / "model").exists(), "a model that is all NaN is not the best one"


# -- data -------------------------------------------------------------------------------------------------------


def spoiled(tables: Path, folder: Path, content: bytes = b"not a picture", row: int = 5) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(tables / "valid.parquet").to_pylist()
    rows[row]["image"] = {"bytes": content, "path": "bad.png"}
    pq.write_table(pa.Table.from_pylist(rows), folder / "bad.parquet")
    return folder / "bad.parquet"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_row_stops_training_and_names_row_file_and_column(tables: Path, tmp_path: Path, workers: int) -> None:
    table = image_only(tables)
    table["data"] |= {"train": str(spoiled(tables, tmp_path)), "workers": workers}
    with pytest.raises(InputError) as caught:
        train(table, tmp_path / "run")
    assert caught.value.message.startswith("bad.parquet row 6, column 'image': ")


@pytest.mark.slow
def test_skipping_counts_and_names_the_rows_left_out(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = image_only(tables, epochs=2)
    table["data"] |= {"train": str(spoiled(tables, tmp_path)), "on_error": "skip"}
    result = train(table, tmp_path / "run", quiet=False)
    output = capsys.readouterr()
    assert result.steps == 4
    assert output.out == ""
    assert output.err.count("skipped: bad.parquet row 6, column 'image'") == 2
    assert "2 unreadable rows were skipped" in output.err


def test_a_table_without_a_single_readable_row_is_an_error(tables: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": b"x", "path": "x"}, "label": f"c{i % 2}"} for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    table = image_only(tables)
    table["data"] |= {"train": str(tmp_path / "bad.parquet"), "on_error": "skip"}
    del table["data"]["valid"]
    with pytest.raises(InputError, match="none of the 8 training rows could be read"):
        train(table, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_a_validation_label_unseen_in_training_is_found_before_training(tables: Path, tmp_path: Path) -> None:
    make_table(tmp_path / "three.parquet", 12, labels=3)
    table = image_only(tables)
    table["data"]["train"] = str(tmp_path / "three.parquet")
    with pytest.raises(InputError) as caught:
        train(table, tmp_path / "run")
    assert "valid.parquet row 4, column 'label': label 'c3' was not seen in training" in caught.value.message
    assert not (tmp_path / "run").exists()


def test_a_missing_column_suggests_the_nearest(tables: Path, tmp_path: Path) -> None:
    table = image_only(tables)
    table["data"]["target"] = "lable"
    with pytest.raises(UsageError, match="did you mean 'label'"):
        train(table, tmp_path / "run")
    table["data"] |= {"target": "label", "inputs": {"image": "imgae"}}
    with pytest.raises(UsageError, match="did you mean 'image'"):
        train(table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- folders and disks ------------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_and_left_alone(tables: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        train(image_only(tables), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_that_cannot_be_a_folder_is_one_line(tables: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MmhubError, match="file"):
        train(image_only(tables), tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_no_permission_to_write_is_one_line(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(loop, "write_file", refuse)
    with pytest.raises(MmhubError, match="permission denied"):
        train(image_only(tables), tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting needs privileges")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_intact(tables: Path, small_disk: Path) -> None:
    with pytest.raises(MmhubError, match="no space left on the device") as caught:
        train(recipe(tables, epochs=9, checkpoint_every=1, keep=99), small_disk / "run")
    assert caught.value.exit_code == 1
    left = sorted((small_disk / "run" / "checkpoints").iterdir())
    assert left
    assert all((path / "manifest.json").exists() and not path.name.startswith(".") for path in left)
    load(left[-1] / "model")


def test_a_full_disk_while_saving_keeps_the_older_checkpoint(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = state.write_file, 0

    def fill(path: Path, content: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:  # the second checkpoint's state
            raise OSError(28, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(state, "write_file", fill)
    with pytest.raises(MmhubError, match="no space left"):
        train(image_only(tables, checkpoint_every=1, epochs=2), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-00000001"]


# -- trackers ---------------------------------------------------------------------------------------------------


class Tracker:
    """Remembers what it was told; can fail."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.events = fail, []  # type: ignore[var-annotated]

    def _note(self, *event: Any) -> None:
        self.events.append(event)
        if event[0] == self.fail:
            raise RuntimeError("tracker\nbroke")

    def on_start(self, run: Any) -> None:
        self._note("start", run.total_steps, run.config["task"])

    def on_log(self, step: int, metrics: Any) -> None:
        self._note("log", step, dict(metrics))

    def on_end(self, run: Any) -> None:
        self._note("end")


def test_trackers_see_start_flat_numbers_and_the_end(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker()
    monkeypatch.setattr(report, "hook_items", lambda *args, **kwargs: [("mmhub-x 1.0", tracker)])
    train(image_only(tables, log_every=1), tmp_path / "run")
    assert tracker.events[0] == ("start", 2, "classification")
    assert tracker.events[-1] == ("end",)
    logs = [event for event in tracker.events if event[0] == "log"]
    assert [step for _, step, _ in logs] == [1, 2, 2]
    assert set(logs[-1][2]) == {"valid/accuracy", "valid/f1", "valid/ece", "valid/loss"}


@pytest.mark.parametrize("event", ["start", "log", "end"])
def test_a_failing_tracker_costs_one_line_and_nothing_else(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], event: str
) -> None:
    broken, fine = Tracker(event), Tracker()
    monkeypatch.setattr(report, "hook_items", lambda *args, **kwargs: [("mmhub-x 1.0", t) for t in (broken, fine)])
    train(image_only(tables, log_every=1), tmp_path / "run")
    assert fine.events[-1] == ("end",)
    assert broken.events[-1][0] == event
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert f"plugin mmhub-x 1.0 is off: Tracker.on_{event} failed: RuntimeError: tracker broke" in warnings[0]


def test_tensorboard_curves_can_be_read_back(tables: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(image_only(tables, log_every=1), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert "valid/accuracy" in events.Tags()["scalars"]


def test_overrides_apply_to_a_table_as_to_a_file(tables: Path, tmp_path: Path) -> None:
    assert train(image_only(tables), tmp_path / "run", overrides=["train.max_steps=1"]).steps == 1


def test_a_frozen_encoder_does_not_move(tables: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    table = image_only(tables, epochs=2)
    table["model"]["encoders"]["image"]["freeze"] = True
    found = []
    for name, steps in (("short", 1), ("long", 4)):
        result = train(table, tmp_path / name, overrides=[f"train.max_steps={steps}"])
        found.append(load_file(result.model / "model.safetensors"))
    moved = {key for key, tensor in found[0].items() if not torch.equal(tensor, found[1][key])}
    assert any(key.startswith("decoder.") for key in moved)
    assert not [key for key in moved if key.startswith("image_encoder.")]


def test_a_copied_run_folder_holds_a_recipe_that_can_be_run_again(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = image_only(tables)
    table["data"] |= {"train": "valid.parquet", "valid": "valid.parquet"}
    monkeypatch.chdir(tables)
    first = train(table, tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    second = train(tmp_path / "first" / "recipe.toml", tmp_path / "second")
    assert (first.model / "model.safetensors").read_bytes() == (second.model / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_of_equally_accurate_models_the_one_with_the_lower_loss_is_best(tables: Path, tmp_path: Path) -> None:
    result = train(recipe(tables, epochs=6), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    valid = [line["valid"] for line in lines if "valid" in line]
    assert sum(values["accuracy"] == result.metrics["accuracy"] for values in valid) > 1, "the case did not occur"
    assert result.metrics["loss"] == pytest.approx(
        min(values["loss"] for values in valid if values["accuracy"] == result.metrics["accuracy"])
    )


def test_a_recipe_with_a_base_takes_the_columns_from_it(tables: Path, trained: Path, tmp_path: Path) -> None:
    table = recipe(tables, max_steps=1)
    table["model"] = {"base": str(trained), "encoders": {"image": {"freeze": True}}}
    del table["data"]["inputs"], table["data"]["target"]
    result = train(table, tmp_path / "run")
    data = read_config(result.model).data
    assert (data.inputs, data.target) == ({"image": "image", "audio": "audio"}, "label")
    assert train(table, tmp_path / "run", resume=True).steps == 1


def test_a_base_whose_columns_the_table_lacks_is_refused_before_training(
    tables: Path, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "c0"}\n')
    table = recipe(tables) | {"model": {"base": str(trained)}, "data": {"train": str(tmp_path / "t.jsonl")}}
    with pytest.raises(UsageError, match="no column 'image'"):
        train(table, tmp_path / "run")
    table["data"] |= {"inputs": {"txt": "text"}, "target": "label"}
    with pytest.raises(UsageError, match="feeds 'txt'"):
        train(table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_new_labels_on_a_base_ask_for_a_new_head(tables: Path, trained: Path, tmp_path: Path) -> None:
    table = recipe(tables) | {"model": {"base": str(trained)}}
    table["data"] |= {"target": "text", "valid": ""}
    with pytest.raises(
        InputError, match=r"column 'text': label .* new head: \[model.decoder\] use = \"classification\""
    ):
        train(table, tmp_path / "run")
    with pytest.raises(UsageError, match=r"does not serve the task 'regression'.*use = \"regression\""):
        train(table | {"task": "regression"}, tmp_path / "run")


def test_a_training_target_that_cannot_be_used_is_named_or_skipped(tmp_path: Path) -> None:
    rows = [f'{{"text": "word {i}", "y": {i if i != 3 else "null"}}}' for i in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    model = {"encoders": {"text": {"use": "rnn", "config": {"dim": 8}}}, "tokenizer": {"kind": "byte"}}
    data = {"train": str(tmp_path / "t.jsonl"), "target": "y"}
    table = {"task": "regression", "model": model, "data": data, "train": {"epochs": 1, "batch_size": 4}}
    with pytest.raises(InputError, match="row 4, column 'y': the target is missing"):
        train(table, tmp_path / "run")
    data["on_error"] = "skip"
    assert train(table, tmp_path / "run").steps == 2


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tables: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": b"no picture", "path": f"{i}.png"}, "label": f"c{i % 2}"} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    table = recipe(tables, epochs=1)
    table["data"] |= {"train": str(tmp_path / "bad.parquet"), "valid": "", "inputs": {"image": "image"}}
    del table["model"]["encoders"]["audio"], table["model"]["fusion"]
    with pytest.raises(InputError, match=r"bad\.parquet row"):
        train(table, tmp_path / "run")
    assert not (tmp_path / "run").exists()
