"""`mmhub bench` measures standard cases with what is installed, and says what is not."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mmhub.cli import bench as benching
from mmhub.cli.bench import CASES, bench
from mmhub.errors import Interrupted, MmhubError
from tests.conftest import Cli


def run(*args: str) -> Any:
    return CliRunner().invoke(bench, list(args))


def test_toy_cases_are_measured_and_written_down(tmp_path: Path) -> None:
    done = run(
        "--size", "toy", "--case", "text", "--case", "frozen", "--json", "-q", "--out", str(tmp_path / "b" / "t.md")
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["size"] == "toy"
    assert found["hardware"] and found["versions"]["torch"]
    text, frozen = found["cases"]
    assert (text["case"], text["steps"]) == ("text", 4)
    assert (frozen["case"], frozen["steps"]) == ("frozen", 20)
    assert text["tokens_per_second"] > text["samples_per_second"], "a text has several tokens"
    for row in (text, frozen):
        assert 0 <= row["data_wait_share"] <= 1
        assert row["whole_samples_per_second"] > 0
    table = (tmp_path / "b" / "t.md").read_text()
    assert "| case | samples/s | tokens/s | data wait | padding | memory GB | whole run samples/s |" in table
    assert "\n| text | " in table
    assert "`mmhub bench --size toy --case text --case frozen`" in table
    assert re.search(r"; commit: (\w+(-dirty)?)\n", table)


def test_images_are_measured_and_a_recipe_key_can_be_changed() -> None:
    done = run("--size", "toy", "--case", "image", "--set", "train.max_steps=2", "--json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["cases"]
    assert row["steps"] == 2
    assert "tokens_per_second" not in row


def test_a_missing_plugin_is_a_line_and_torch_is_not_even_loaded(cli: Cli) -> None:
    done = cli(
        "bench", "--size", "toy", "--case", "image", MMHUB_DISABLE_PLUGINS="mmhub-image", PYTHONPROFILEIMPORTTIME="1"
    )
    assert done.returncode == 1
    assert "image: not measured: image_encoder 'timm' is in mmhub-image" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]


def test_a_case_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Any, size: str, overrides: Any) -> Any:
        row = {"case": case.name, "samples_per_second": 12345.6, "data_wait_share": 0.5, "mfu": 0.25, "steps": 1}
        return row if case.name == "text" else benching._problem(case.name, MmhubError("out of memory", "use less"))

    monkeypatch.setattr(benching, "_measure", fail)
    done = run("--size", "toy")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["CASE", "SAMPLES/S", "MFU", "DATA", "WAIT"]
    assert lines[1].split() == ["text", "12,346", "25.0%", "50.0%"]
    assert lines[2] == "image: not measured: out of memory; use less"
    assert lines[3] == "frozen: not measured: out of memory; use less"


def test_the_rate_of_the_whole_run_counts_what_was_trained() -> None:
    whole = []
    for change in ("train.epochs=2", "train.max_steps=1"):
        done = run("--size", "toy", "--case", "text", "--set", change, "--json", "-q")
        (row,) = json.loads(done.stdout)["cases"]
        whole.append(round(row["whole_samples_per_second"] * row["seconds"]))
    assert whole == [pytest.approx(128, rel=0.02), pytest.approx(16, rel=0.02)]


def test_features_of_the_users_cache_are_neither_read_nor_added_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMHUB_CACHE", str(tmp_path))
    assert run("--size", "toy", "--case", "frozen").exit_code == 0
    assert os.environ["MMHUB_CACHE"] == str(tmp_path)
    assert not (tmp_path / "features").exists()


def test_whatever_breaks_a_case_is_a_line_and_ctrl_c_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("mmhub.engine.train", fail)
    done = run("--size", "toy", "--case", "text")
    assert done.exit_code == 1
    assert "text: not measured: RuntimeError: no compiler" in done.stdout

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Interrupted("stopped", "go on", 130)

    monkeypatch.setattr("mmhub.engine.train", stop)
    assert isinstance(run("--size", "toy", "--case", "text").exception, Interrupted)


def test_a_table_that_cannot_be_written_is_printed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "_measure", lambda case, *args: {"case": case.name, "samples_per_second": 1.0})
    (tmp_path / "file").touch()
    done = run("--size", "toy", "--case", "text", "--out", str(tmp_path / "file" / "t.md"))
    assert isinstance(done.exception, MmhubError)
    assert "SAMPLES/S" in done.stdout


def test_every_case_has_every_size() -> None:
    for case in CASES.values():
        assert set(case.rows) == set(case.train) == {"toy", "small", "gpu"}
        assert all(case.encoder(size)[1]["use"] for size in case.rows)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_cases_for_a_gpu_run_there() -> None:
    done = run("--json", "--set", "train.max_steps=20")
    assert done.exit_code == 0
    assert all(row["mfu"] > 0 for row in json.loads(done.stdout)["cases"])
