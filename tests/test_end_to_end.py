"""The main job through the command line: train, evaluate, publish, load by name in a fresh process, predict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmhub.cli.main import main
from mmhub.config import check_recipe, dump_recipe
from tests.conftest import Cli, flac, png, recipe

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mmhub ARGS` in the project folder, in this process, for speed; return exit code, stdout and stderr."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(args)
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run


def result(code: int, out: str, err: str) -> dict[str, Any]:
    """The one JSON document on stdout of a command that went well."""
    assert code == 0, err
    document = json.loads(out)
    assert isinstance(document, dict)
    return document


@pytest.fixture
def project(tables: Path, tmp_path: Path) -> Path:
    """A folder with a recipe, its tables and two samples."""
    for name in ("train.parquet", "valid.parquet"):
        shutil.copy(tables / name, tmp_path / name)
    table = recipe(tables, epochs=6)
    table["model"]["encoders"]["image"]["config"]["augment"] = "none"
    table["data"] |= {"train": "train.parquet", "valid": "valid.parquet"}
    (tmp_path / "shapes.toml").write_text(dump_recipe(check_recipe(table | {"card": {"license": "mit"}})))
    (tmp_path / "2.png").write_bytes(png(2))
    (tmp_path / "3.flac").write_bytes(flac(3))
    return tmp_path


@pytest.mark.slow
def test_from_a_recipe_to_a_model_loaded_by_name(project: Path, here: Run, cli: Cli, hub: str) -> None:
    trained = result(*here("train", "shapes.toml", "--json", "-q"))
    assert set(trained) == {"out", "model", "metrics", "steps", "seconds"}
    assert (trained["out"], trained["model"], trained["steps"]) == ("runs/shapes", "runs/shapes/model", 36)
    assert set(trained["metrics"]) == {"accuracy", "f1", "ece", "loss"}

    report = result(*here("eval", "runs/shapes/model", "--data", "valid.parquet", "--json"))
    assert (report["task"], report["rows"]) == ("classification", 16)
    assert report["metrics"] == pytest.approx(trained["metrics"], abs=1e-5)
    assert set(report["subsets"]) == {"image", "audio", "image+audio"}

    pushed = result(*here("push", "runs/shapes/model", "team/shapes", "--tag", "v1", "--json", "-q"))
    expected = {"repo", "url", "commit", "files", "deleted", "left_out", "pull_request", "dry_run", "changed"} | {
        "signed",
        "findings",
    }
    assert set(pushed) == expected
    (project / "registry.toml").write_text(
        f'schema = 1\n[models.shapes]\nref = "hub:team/shapes"\ncommit = "{pushed["commit"]}"\n'
    )
    cache = {"HF_HUB_CACHE": str(project / "cache")}
    done = cli("pull", "shapes", "--json", **cache)
    pulled = result(done.returncode, done.stdout, done.stderr)
    assert set(pulled) == {"name", "path", "task", "files", "signed_by", "signed_as"}
    assert pulled["files"] == pushed["files"]

    both = cli("predict", "shapes", "--image", "2.png", "--audio", "3.flac", "--json", **cache)
    (answer,) = result(both.returncode, both.stdout, both.stderr)["predictions"]
    assert set(answer) == {"label", "score", "scores"}
    assert both.stderr == ""
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_each_input_alone_and_a_table_predict(project: Path, trained: Path, here: Run) -> None:
    model = project / "model"
    shutil.copytree(trained, model)
    twice = result(*here("predict", "./model", "--image", "2.png", "--image", "2.png", "--json"))["predictions"]
    assert len(twice) == 2
    assert twice[0]["scores"] == pytest.approx(twice[1]["scores"], abs=1e-5)
    (heard,) = result(*here("predict", "./model", "--audio", "3.flac", "--json"))["predictions"]
    assert set(heard) == {"label", "score", "scores"}
    code, out, err = here("predict", "./model", "--data", "valid.parquet", "--out", "answers.jsonl")
    assert (code, out) == (0, ""), err
    assert "16 predictions in answers.jsonl" in err
    lines = [json.loads(line) for line in (project / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert all(set(line) == {"label", "score", "scores"} for line in lines)
    code, out, err = here("predict", "./model", "--data", "valid.parquet", "--out", "answers.jsonl")
    assert (code, out) == (2, "")
    assert "'answers.jsonl' exists" in err


def test_progress_is_plain_lines_on_stderr_and_the_result_one_line_on_stdout(here: Run) -> None:
    code, out, err = here("train", "shapes.toml", "--out", "run", "--set", "train.epochs=1")
    assert code == 0, err
    assert out.startswith("./run/model  accuracy ")  # as a name, run/model could also be a repository
    assert len(out.splitlines()) == 1
    assert "classification: 48 rows" in err
    assert "\r" not in err
    assert "arning" not in err
