"""`mmhub index build`, `search` and `info`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mmhub.errors import InputError, MmhubError, NotFoundError, UsageError
from mmhub.model import Model
from tests.colours import colour_model, pictures
from tests.conftest import Cli, png


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return pictures(tmp_path / "pictures")


@pytest.fixture
def mmhub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `mmhub index ARGS` in this process; any model's name is that of the colours."""
    import mmhub.hub
    from mmhub.cli.main import cli

    model = colour_model()

    def load(name: str, *, device: str) -> Model:
        model.name = name
        return model

    monkeypatch.setattr(mmhub.hub, "load", load)
    monkeypatch.setattr("mmhub.index.builder.load", load)

    def run(*args: object) -> Result:
        return CliRunner().invoke(cli, ["index", *map(str, args)], standalone_mode=False)

    return run


def error_of(done: Result) -> MmhubError:
    assert isinstance(done.exception, MmhubError), done
    return done.exception


def test_a_folder_is_indexed_and_searched(mmhub: Any, folder: Path) -> None:
    done = mmhub("build", "colours", "pictures")
    assert done.stdout == "3 vectors in pictures/.mmhub-index: 3 added\n"
    done = mmhub("search", "pictures", "--text", "green", "-k", 1)
    score, path = done.stdout.rstrip("\n").split("\t")
    assert path == "pictures/deep/g.png" and Path(path).exists() and float(score) > 0.99


def test_results_come_as_one_json_document(mmhub: Any, folder: Path) -> None:
    built = json.loads(mmhub("build", "colours", "pictures", "--json").stdout)
    assert {key: built[key] for key in ("count", "added", "kept", "dim", "failed", "modality")} == {
        "count": 3, "added": 3, "kept": 0, "dim": 3, "failed": [], "modality": "image",
    }  # fmt: skip
    found = json.loads(mmhub("search", "pictures", "--image", "pictures/r.png", "--json").stdout)
    assert found["query"] == {"image": "pictures/r.png"}
    assert [row["path"] for row in found["results"]] == ["pictures/r.png", "pictures/b.png", "pictures/deep/g.png"]
    assert found["results"][0]["score"] == pytest.approx(1.0)


def test_names_of_files_only_show_in_a_terminal(mmhub: Any, folder: Path) -> None:
    strange = folder.rename(folder.with_name("a\x1b[2J"))
    assert mmhub("build", "colours", strange.name).stdout.startswith("3 vectors in a\N{REPLACEMENT CHARACTER}[2J/")
    for words in (("search", strange.name, "--text", "green"), ("info", strange.name)):
        said = mmhub(*words).stdout
        assert "\x1b" not in said
        assert "a\N{REPLACEMENT CHARACTER}[2J" in said


def test_unreadable_files_are_one_line_each_beside_the_result(mmhub: Any, folder: Path) -> None:
    (folder / "broken\n.png").write_bytes(b"no picture")
    done = mmhub("build", "colours", "pictures", "-q")
    assert done.exception is None
    assert done.stderr.startswith("skipped broken .png: 'pictures/broken .png' is no image\n")
    assert done.stdout.endswith("3 added, 1 unreadable\n")
    assert isinstance(error_of(mmhub("build", "colours", "pictures", "--on-error", "stop")), InputError)


def test_another_model_than_before_has_to_be_asked_for(
    mmhub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmhub("build", "colours", "pictures")
    other = colour_model("image", task="embedding")
    monkeypatch.setattr("mmhub.index.builder.load", lambda name, device: other)
    error = error_of(mmhub("build", "other", "pictures"))
    assert "another model, colours" in str(error) and "--rebuild" in str(error)
    assert mmhub("build", "other", "pictures", "--rebuild").stdout.endswith("3 added\n")


def test_mistakes_in_a_search_are_named(mmhub: Any, folder: Path) -> None:
    assert "has no index" in str(error_of(mmhub("search", "pictures", "--text", "red")))
    mmhub("build", "colours", "pictures")
    assert isinstance(error_of(mmhub("search", "pictures")), UsageError)
    assert isinstance(error_of(mmhub("search", "pictures", "--text", "red", "--image", "pictures/r.png")), UsageError)
    assert "at least 1" in str(error_of(mmhub("search", "pictures", "--text", "red", "-k", 0)))
    missing = error_of(mmhub("search", "pictures", "--image", "pictures/rr.png"))
    assert isinstance(missing, NotFoundError) and "did you mean 'r.png'" in str(missing)
    (folder / "a.wav").touch()
    assert "has no input 'audio'" in str(error_of(mmhub("search", "pictures", "--audio", "pictures/a.wav")))
    assert isinstance(error_of(mmhub("build", "colours", "nowhere")), NotFoundError)


def test_a_search_may_name_the_model_anew(mmhub: Any, folder: Path) -> None:
    mmhub("build", "colours", "pictures", "--out", "kept")
    assert mmhub("search", "kept", "--text", "blue", "--model", "moved", "-k", 1).stdout.endswith("b.png\n")


def test_info_says_what_an_index_holds(mmhub: Any, folder: Path) -> None:
    mmhub("build", "colours", "pictures", "--hnsw")
    facts = json.loads(mmhub("info", "pictures", "--json").stdout)
    assert (facts["model"], facts["kind"], facts["count"], facts["dim"]) == ("colours", "hnsw", 3, 3)
    assert facts["source"] == "pictures" and facts["bytes"] > 0
    assert "colours" in mmhub("info", "pictures").stdout


def test_info_loads_no_heavy_library(mmhub: Any, folder: Path) -> None:
    mmhub("build", "colours", "pictures")
    code = (
        "import sys; from mmhub.index import Index; Index.open('pictures'); print({*sys.modules} & {'torch', 'faiss'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder.parent, check=False)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.slow
def test_a_trained_model_is_searched_by_its_own_name_in_a_process_of_its_own(
    trained: Path, tmp_path: Path, cli: Cli
) -> None:
    for number in range(8):
        (tmp_path / "pics").mkdir(exist_ok=True)
        (tmp_path / "pics" / f"{number}.png").write_bytes(png(number))
    (tmp_path / "model").symlink_to(trained)
    done = cli("index", "build", "./model#image", "pics")
    assert done.returncode == 0 and done.stdout.endswith("8 added\n"), done.stderr
    done = cli("index", "search", "pics", "--image", "pics/3.png", "-k", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["path"] for row in json.loads(done.stdout)["results"]] == ["pics/3.png", "pics/7.png"]  # one class
    done = cli("index", "search", "../pics", "--image", "3.png", "-k", "1", cwd=tmp_path / "pics")
    assert done.stdout == "1.0000\t../pics/3.png\n", done.stderr
    done = cli("index", "search", "pics", "--text", "three")
    assert done.returncode == 2 and "has no input 'text'" in done.stderr and done.stderr.count("\n") == 2
