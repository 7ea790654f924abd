"""`mmhub export`: one folder, written whole or not at all, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mmhub
from mmhub.cli.main import main
from mmhub_export.cli import _leave_out_guards
from mmhub_export.record import Export
from tests.conftest import SHARED, Cli, _one_thread, _own_caches, cli  # noqa: F401

ROWS = "text,label\n" + "".join(f"a {word} thing,{label}\n" for word, label in [("good", "yes"), ("bad", "no")] * 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained classifier of texts."""
    made = mmhub.compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 64, "embedding_dim": 64}}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        tokenizer={"kind": "bpe", "vocab_size": 300},
        texts=["a good thing", "a bad thing"],
    )
    return made.save(tmp_path_factory.mktemp("models") / "mine")


class Ran:
    """What a command printed and returned."""

    def __init__(self, arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, arguments)))
        self.code = stopped.value.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: Ran(list(arguments), capsys)


def test_a_checkpoint_of_8_bits_is_written_measured_and_loaded(run: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(ROWS)
    names = ["--inputs", "text=text", "--target-column", "label"]
    done = run("export", model, "--format", "int8", "--data", "rows.csv", *names, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["out"], found["format"], found["name"]) == ("mine-int8", "int8", "mine")
    assert found["weights"]["bytes_before"] > 2.5 * found["weights"]["bytes"]
    assert found["measured"]["rows"] == 8
    assert found["measured"]["original"].keys() == found["measured"]["export"].keys() >= {"accuracy"}
    assert {check["what"] for check in found["checks"]} == {"weights", "outputs"}
    kept = json.loads((tmp_path / "mine-int8" / "export.json").read_text())
    assert kept == {key: value for key, value in found.items() if key != "out"}
    assert kept["files"].keys() == {p.name for p in (tmp_path / "mine-int8").iterdir()} - {"export.json"}
    assert "times less than" in done.err
    assert "accuracy on 8 rows: " in done.err
    assert mmhub.load(tmp_path / "mine-int8").predict([{"text": "a good thing"}])[0]["label"] in ("no", "yes")


def test_the_result_is_the_folder_and_quiet_is_quiet(run: Any, model: Path) -> None:
    done = run("export", model, "--format", "safetensors-fp16", "--out", "deep/er", "-q")
    assert (done.code, done.out, done.err) == (0, "deep/er\n", "")
    shown = run("models", "show", "./deep/er", "--json")
    assert json.loads(shown.out)["loadable"] == "yes"


def test_guards_that_stay_behind_are_said(tmp_path: Path) -> None:
    pytest.importorskip("mmhub_guards")
    guards = [{"use": "wordlist", "config": {"words": ["bomb"]}}]
    parts = {"text": {"use": "rnn", "config": {"dim": 4, "embedding_dim": 4}}}
    labels = {"use": "classification", "config": {"labels": ["no", "yes"]}}
    model = mmhub.compose(encoders=parts, decoder=labels, texts=["a"], guards=guards)
    (tmp_path / "README.md").write_text("# mine\n")
    record = Export(format="onnx", name="mine", task="classification", modalities=("text",))
    said = _leave_out_guards(record, model, tmp_path)
    assert said == "what is written has no guards; the model has mmhub-guards/wordlist"
    assert record.write(tmp_path)["guards_left_out"] == ["mmhub-guards/wordlist"]
    assert "is guarded by `mmhub-guards/wordlist`; nothing here is.\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "int9"], 2, "there is no format 'int9'"),
        (["--format", "int9"], 2, "did you mean 'int8'?"),
        (["--format", "int8", "--out", "here"], 2, "'here' exists"),
        (["--format", "int8", "--inputs", "text=a"], 2, "add --data, or leave them out"),
        (["--format", "int8", "--data", "nowhere.csv"], 3, "nowhere.csv"),
        (["--format", "transformers"], 2, "cannot hold a mmhub-text/lstm encoder"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    run: Any, model: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "here").mkdir()
    done = run("export", model, *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_file_in_the_way_is_said(run: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = run("export", model, "--format", "int8", "--out", "file/deep/x")
    assert (done.code, done.out) == (2, "")
    assert "'file' is no folder" in done.err


def test_what_another_wrote_meanwhile_is_not_replaced(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Export.write

    def slowly(found: Export, folder: Path) -> dict[str, Any]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
        return write(found, folder)

    monkeypatch.setattr(Export, "write", slowly)
    done = run("export", model, "--format", "int8", "--out", "out")
    assert done.code == 2
    assert "'out' exists" in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_name_that_is_none_is_not_found(run: Any, tmp_path: Path) -> None:
    assert run("export", "./nothing", "--format", "int8").code == 3
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_written_to_is_said_before_the_model_is_read(
    run: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", locked)
    monkeypatch.setattr("mmhub.hub.load", lambda name: pytest.fail("it was read"))
    done = run("export", model, "--format", "int8", "--out", "locked/x")
    assert done.code == 1
    assert "choose a folder you may write to" in done.err


def test_a_full_disk_is_said_and_leaves_nothing(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, needed: int) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("mmhub.weights.check_space", full)
    done = run("export", model, "--format", "int8")
    assert done.code == 1
    assert "no space left on the device" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(model: Path, tmp_path: Path) -> None:
    code = (
        "import time; from mmhub_export import smaller; whole = smaller.save\n"
        "smaller.save = lambda *a, **k: (whole(*a, **k), print('written', flush=True), time.sleep(60))\n"
        "from mmhub.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "export", str(model), "--format", "int8", "--out", "here"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        assert [path.name for path in tmp_path.iterdir()] == [f".here.{process.pid}.tmp"]
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_encoder_loses_less_than_a_point_in_8_bits(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    source = Path(os.environ.get("MMHUB_REAL_MODELS", "real-models"), "all-MiniLM-L6-v2")
    rows = SHARED / "data" / "sst2" / "dev.tsv"
    if not source.is_dir() or not rows.is_file():
        pytest.skip("needs all-MiniLM-L6-v2 in MMHUB_REAL_MODELS and data/sst2 in MMHUB_SHARED")
    train = tmp_path / "train.tsv"
    train.write_text("".join((SHARED / "data" / "sst2" / "train.tsv").read_text().splitlines(keepends=True)[:400]))
    recipe = {
        "task": "classification",
        "model": {"encoders": {"text": {"use": "transformers", "init": str(source), "freeze": True}}},
        "data": {"train": str(train), "columns": ["text", "label"], "inputs": {"text": "text"}, "target": "label"},
        "train": {"epochs": 3, "batch_size": 32, "learning_rate": 1e-2},
    }
    trained = mmhub.train(recipe, tmp_path / "run").model
    done = cli("export", trained, "--format", "int8", "--data", rows, "--json", "--out", "small")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before, after = (found["measured"][key]["accuracy"] for key in ("original", "export"))
    assert before > 0.7
    assert after > before - 0.01
    sizes = [sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (trained, tmp_path / "small")]
    assert sizes[0] > 2.5 * sizes[1]
