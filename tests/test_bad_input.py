"""Bad input on the command line: one line on stderr, nothing on stdout, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmhub.cli.main import main
from mmhub.config import check_recipe, dump_recipe
from mmhub.errors import InputError
from mmhub.interfaces import Policy, raw_bytes
from tests.conftest import flac, png, recipe

Fails = Callable[..., str]


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Run `mmhub ARGS` in `tmp_path`, check that it fails in one line with `code` and writes nothing; return stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there

    def run(code: int, *args: object) -> str:
        before = listing(tmp_path)
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        output = capsys.readouterr()
        lines = output.err.splitlines()
        assert caught.value.code == code, output.err
        assert output.out == ""
        assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"]), output.err
        assert listing(tmp_path) == before, "nothing is written"
        return output.err

    return run


def test_a_pipe_or_device_is_read_up_to_the_limit_alone() -> None:
    reads, writes = os.pipe()
    written: list[int] = []

    def write() -> None:
        try:
            for _ in range(64):
                written.append(os.write(writes, bytes(2**16)))
        except BrokenPipeError:
            pass
        os.close(writes)

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(InputError, match="more than the limit of 1000"):
        raw_bytes(f"/dev/fd/{reads}", Policy(max_bytes=1000))
    os.close(reads)
    writer.join()
    assert len(written) < 64


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Good and bad files."""
    (tmp_path / "good.png").write_bytes(png(1, 64))
    (tmp_path / "good.flac").write_bytes(flac(1))
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(png(1, 64)[:-400])
    (tmp_path / "cut.flac").write_bytes(flac(1)[:30])
    (tmp_path / "text.wav").write_text("RIFF, I am not")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--image", "goood.png"], 3, "did you mean 'good.png'"),
        (["--image", "empty.png"], 1, "'empty.png' is empty"),
        (["--image", "cut.png"], 1, "'cut.png'"),
        (["--image", "folder.png"], 1, "'folder.png' is a folder"),
        (["--image", "good.flac"], 1, "'good.flac'"),
        (["--audio", "text.wav"], 1, "'text.wav'"),
        (["--audio", "cut.flac"], 1, "'cut.flac'"),
        (["--audio", "good.png"], 1, "'good.png'"),
        (["--image", "http://127.0.0.1:9/x.png"], 1, "--allow-urls"),
        (["--image", "good.png", "--image", "empty.png"], 1, "'empty.png' is empty"),
        (["--image", "good.png", "--audio", "good.flac", "--audio", "good.flac"], 2, "1 image, 2 audio"),
        (["--text", "hello"], 2, "no input 'text'"),
        (["--input", "imgae=good.png"], 2, "did you mean 'image'"),
        (["--input", "image"], 2, "modality=value"),
        ([], 2, "--data"),
        (["--image", "good.png", "--data", "x.csv"], 2, "not both"),
        (["--data", "absent.csv"], 3, "absent.csv"),
        (["--image", "good.png", "--batch-size", "0"], 2, "--batch-size"),
        (["--image", "good.png", "--device", "tpu9"], 2, "tpu9"),
        (["--image", "good.png", "--out", "good.flac"], 2, "exists"),
        (["--image", "good.png", "--out", "good.png/x/y.jsonl"], 2, "'good.png' is a file"),
    ],
)
def test_predict_names_what_is_wrong_with_its_input(
    fails: Fails, trained: Path, media: Path, options: list[str], code: int, says: str
) -> None:
    assert says in fails(code, "predict", trained, *options)


def test_predicting_a_table_names_row_and_column(fails: Fails, trained: Path, media: Path) -> None:
    (media / "t.csv").write_text("image,label\ngood.png,c1\nempty.png,c2\n")
    message = fails(1, "predict", trained, "--data", "t.csv", "--out", "out.jsonl")
    assert "t.csv row 2, column 'image': " in message
    assert "empty.png' is empty" in message


def test_a_name_that_nobody_has_is_not_found(fails: Fails) -> None:
    assert "no model is registered as 'digitz'" in fails(3, "predict", "digitz", "--text", "x")
    assert "no folder './digitz'" in fails(3, "eval", "./digitz", "--data", "x.csv")


def test_a_hub_that_cannot_be_reached_is_a_network_error(fails: Fails) -> None:
    for command in (["pull", "org/x"], ["predict", "org/x", "--text", "x"]):
        assert "127.0.0.1:9" in fails(6, *command)


def test_an_unreadable_checkpoint_is_an_integrity_error(
    fails: Fails, trained: Path, tmp_path: Path, media: Path
) -> None:
    for name, spoil in (
        ("flipped", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        ("cut", lambda content: content[:-100]),
        ("empty", lambda content: b""),
    ):
        folder = shutil.copytree(trained, tmp_path / name)
        weights = folder / "model.safetensors"
        weights.write_bytes(spoil(weights.read_bytes()))
        assert "model.safetensors" in fails(5, "predict", folder, "--image", "good.png")
        assert "model.safetensors" in fails(5, "eval", folder, "--data", "x.csv")
        assert "model.safetensors" in fails(5, "push", folder, "org/x", "--license", "mit")
    folder = shutil.copytree(trained, tmp_path / "config")
    (folder / "config.json").write_text("{")
    assert "config.json" in fails(5, "predict", folder, "--image", "good.png")


def test_a_checkpoint_of_an_absent_plugin_shows_the_install_line(fails: Fails, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["requires"].append({"distribution": "mmhub-lidar", "specifier": ">=0.1,<1", "components": ["x:y"]})
    (folder / "config.json").write_text(json.dumps(config))
    message = fails(4, "predict", folder, "--text", "x")
    assert "mmhub-lidar" in message.splitlines()[1]
    assert "install" in message.splitlines()[1]


# -- recipes ----------------------------------------------------------------------------------------------------


def write(folder: Path, table: dict[str, Any]) -> Path:
    (folder / "r.toml").write_text(dump_recipe(check_recipe(table)))
    return folder / "r.toml"


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("train.epoch=3", 2, "did you mean 'epochs'"),
        ("train.epochs=0", 2, "at least 1"),
        ("task=clasification", 2, "did you mean 'classification'"),
        ("model.encoders.image.use=tim", 3, "did you mean 'timm'"),
        ("model.fusion.use=atention", 3, "did you mean 'attention'"),
        ("model.decoder.use=clasification", 3, "did you mean 'classification'"),
        ("model.encoders.image.config.architecture=test_resnett", 2, "did you mean 'test_resnet'"),
        ("model.encoders.image.config.achitecture=x", 2, "did you mean 'architecture'"),
        ("model.encoders.image.init=./nowhere", 3, "no folder './nowhere'"),
        ("model.fusion.config.dim=33", 2, "heads"),
        ("data.target=lable", 2, "did you mean 'label'"),
        ("data.inputs.image=imgae", 2, "did you mean 'image'"),
        ("data.inputs.video=image", 2, "no such encoder"),
        ("data.train=absent.parquet", 3, "absent.parquet"),
        ("data.train=", 2, "no training data"),
        ("data.valid=absent.parquet", 3, "absent.parquet"),
        ("train.device=tpu", 2, "tpu"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_written(
    fails: Fails, tables: Path, tmp_path: Path, override: str, code: int, says: str
) -> None:
    path = write(tmp_path, recipe(tables))
    assert says in fails(code, "train", path, "--out", "run", "-q", "--set", override)


def test_an_unknown_base_is_not_found(fails: Fails, tables: Path, tmp_path: Path) -> None:
    path = write(tmp_path, recipe(tables) | {"model": {"base": "nobody"}})
    assert "no model is registered as 'nobody'" in fails(3, "train", path, "--out", "run")


def test_an_existing_run_folder_is_refused(fails: Fails, tables: Path, tmp_path: Path) -> None:
    path = write(tmp_path, recipe(tables))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").touch()
    assert "--resume" in fails(2, "train", path, "--out", "run")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.parquet", b"PAR1 no"),
        ("t.csv", b""),
        ("t.csv", b"image,label\n"),
        ("t.jsonl", b'{"a": 1\n'),
        ("t.csv.gz", b"x"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(
    fails: Fails, tables: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    path = write(tmp_path, recipe(tables))
    assert name in fails(1, "train", path, "--out", "run", "-q", "--set", f"data.train={name}")


def test_eval_names_what_is_wrong_with_the_table(fails: Fails, trained: Path, media: Path) -> None:
    (media / "t.csv").write_text("image,label\ngood.png,c1\ncut.png,c2\n")
    (media / "u.csv").write_text("image,label\ngood.png,c9\n")
    (media / "v.csv").write_text("image,lable\ngood.png,c1\n")
    assert "t.csv row 2, column 'image'" in fails(1, "eval", trained, "--data", "t.csv")
    assert "u.csv row 1, column 'label': label 'c9' was not seen" in fails(1, "eval", trained, "--data", "u.csv")
    assert "did you mean 'lable'" in fails(2, "eval", trained, "--data", "v.csv")
    assert "modality=column" in fails(2, "eval", trained, "--data", "v.csv", "--inputs", "image")
