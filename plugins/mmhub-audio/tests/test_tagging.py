"""Audio tagging from the command line: several sounds at once, each of them named."""

from __future__ import annotations

import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from mmhub.cli.main import main

PITCHES = {"hum": 200.0, "beep": 900.0, "whistle": 2500.0}  # Hz
MIXES = [mix for size in range(3) for mix in combinations(PITCHES, size)]  # of none, one or two

RECIPE = """
task = "multilabel"
[model.encoders.audio]
use = "cnn"
config = { sample_rate = 8000, dim = 32, channels = [8, 8], n_mels = 32 }
[data]
train = "train.parquet"
valid = "valid.parquet"
inputs = { audio = "audio" }
target = "sounds"
[train]
epochs = 6
batch_size = 8
learning_rate = 1e-2
"""


def recording(mix: tuple[str, ...], seed: int) -> bytes:
    """Two tenths of a second of the tones of a mix, each with its own level and phase, over noise."""
    random = np.random.default_rng(seed)
    time = np.arange(1600) / 8000
    tones = [random.uniform(0.1, 0.3) * np.sin(2 * np.pi * PITCHES[m] * time + random.uniform(0, 6)) for m in mix]
    file = io.BytesIO()
    soundfile.write(file, sum(tones, 0.01 * random.standard_normal(1600)), 8000, format="FLAC")
    return file.getvalue()


def table(path: Path, rows: int, seed: int) -> None:
    mixes = [MIXES[i % len(MIXES)] for i in range(rows)]
    audio = [{"bytes": recording(mix, seed + i), "path": f"{i}.flac"} for i, mix in enumerate(mixes)]
    pq.write_table(pa.table({"audio": audio, "sounds": [list(mix) for mix in mixes]}), path)


def test_recorded_noise_is_found_from_the_recipe_and_its_folder_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(tmp_path / "train.parquet", 8, 0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    noise = 'augment = { noise_db = [5, 5], noise = "recorded" }, '
    text = RECIPE.replace("config = { ", "config = { " + noise).replace('valid = "valid.parquet"', 'noise = "hiss"')
    (tmp_path / "r.toml").write_text(text.replace("epochs = 6", "epochs = 1"))

    def train(recipe: Path, out: str, *more: str) -> Any:
        with pytest.raises(SystemExit) as caught:
            main(["train", str(recipe), "--out", out, *more])
        return caught.value.code

    assert train(tmp_path / "r.toml", "run") == 2
    assert "data.noise: no folder 'hiss'\nhint: name one relative to the recipe" in capsys.readouterr().err
    (tmp_path / "hiss").mkdir()
    (tmp_path / "hiss" / "a.flac").write_bytes(recording((), 99))
    assert not train(tmp_path / "r.toml", "run"), capsys.readouterr().err
    assert str(tmp_path / "hiss") in Path("run", "recipe.toml").read_text()
    for name in ("config.json", "provenance.json", "README.md"):
        assert str(tmp_path) not in Path("run", "model", name).read_text()
    monkeypatch.chdir(tmp_path)
    assert not train(Path("elsewhere/run/recipe.toml"), "elsewhere/run", "--resume"), capsys.readouterr().err


@pytest.mark.slow
def test_mixed_tones_are_tagged_by_a_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "train.parquet", 56, 0)
    table(tmp_path / "valid.parquet", 28, 1000)
    (tmp_path / "tags.toml").write_text(RECIPE)
    (tmp_path / "both.flac").write_bytes(recording(("hum", "whistle"), 5000))

    def run(*words: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as caught:
            main([*words, "--json"])
        output = capsys.readouterr()
        assert not caught.value.code, output.err
        document: dict[str, Any] = json.loads(output.out)
        return document

    run("train", "tags.toml", "--out", "run", "-q")
    metrics = run("eval", "./run/model", "--data", "valid.parquet")["metrics"]
    assert metrics["exact_match"] > 0.8
    assert metrics["f1"] > 0.9
    (answer,) = run("predict", "./run/model", "--audio", "both.flac")["predictions"]
    assert sorted(answer["labels"]) == ["hum", "whistle"]
    assert answer["scores"].keys() == PITCHES.keys()
