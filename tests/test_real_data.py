"""What the examples reach on real data and real pretrained weights, through the command line. Slow; see examples/.

The data sets and weights are not part of the project. Point MMHUB_SHARED at a folder with data/ (cifar10-small, fsdd,
sst2) and MMHUB_REAL_MODELS at one with all-MiniLM-L6-v2 and efficientnet_lite0; what is missing is skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SHARED, Cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = Path(os.environ.get("MMHUB_REAL_MODELS", "real-models"))


def data(name: str) -> Path:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


def weights(name: str) -> Path:
    path = (MODELS / name).absolute()
    if not path.exists():
        pytest.skip(f"needs {path} (MMHUB_REAL_MODELS)")
    return path


def train(cli: Cli, example: str, folder: Path, endings: tuple[str, str], *settings: str) -> dict[str, Any]:
    """Train an example on the given train and valid files; return what `train --json` printed."""
    files = [f'data.{key}="{folder / name}"' for key, name in zip(("train", "valid"), endings, strict=True)]
    overrides = [part for text in (*files, *settings) for part in ("--set", text)]
    done = cli("train", EXAMPLES / example, "--out", "run", "--json", *overrides, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    print(example, *settings, result["metrics"], f"{result['seconds']} s")
    return result


PARQUET = ("train.parquet", "valid.parquet")


def test_a_small_resnet_learns_cifar10_from_scratch_in_ten_minutes(cli: Cli) -> None:
    result = train(cli, "cifar10/scratch.toml", data("cifar10-small"), PARQUET)
    assert result["metrics"]["accuracy"] >= 0.58
    assert result["seconds"] < 600


def test_another_backbone_is_one_word(cli: Cli) -> None:
    word = 'model.encoders.image.config.architecture="resnet18"'
    result = train(cli, "cifar10/scratch.toml", data("cifar10-small"), PARQUET, word, "train.epochs=3")
    assert result["metrics"]["accuracy"] >= 0.35


def test_a_head_on_a_frozen_efficientnet_knows_cifar10(cli: Cli) -> None:
    init = f'model.encoders.image.init="{weights("efficientnet_lite0/model.safetensors")}"'
    result = train(cli, "cifar10/frozen.toml", data("cifar10-small"), PARQUET, init)
    assert result["metrics"]["accuracy"] >= 0.74


@pytest.mark.parametrize("encoder", ["cnn", "conformer"])
def test_spoken_digits_are_recognised_within_five_minutes(cli: Cli, encoder: str) -> None:
    result = train(cli, f"spoken-digits/{encoder}.toml", data("fsdd"), PARQUET)
    assert result["metrics"]["accuracy"] >= 0.97
    assert result["seconds"] < 300


def test_minilm_fine_tuned_on_sst2(cli: Cli) -> None:
    init = f'model.encoders.text.init="{weights("all-MiniLM-L6-v2")}"'
    result = train(cli, "sst2/minilm.toml", data("sst2"), ("train.tsv", "dev.tsv"), init)
    assert result["metrics"]["accuracy"] >= 0.86


def test_an_lstm_learns_sst2_from_scratch(cli: Cli) -> None:
    result = train(cli, "sst2/lstm.toml", data("sst2"), ("train.tsv", "dev.tsv"))
    assert result["metrics"]["accuracy"] >= 0.74


def test_picture_and_sound_together_beat_each_alone(cli: Cli, tmp_path: Path) -> None:
    for name, repeats in (("train", 2), ("valid", 3)):
        pair(
            data("cifar10-small") / f"{name}.parquet",
            data("fsdd") / f"{name}.parquet",
            tmp_path / f"{name}.parquet",
            repeats,
        )
    result = train(cli, "fusion/pairs.toml", tmp_path, PARQUET)
    done = cli("eval", result["model"], "--data", tmp_path / "valid.parquet", "--json")
    subsets = json.loads(done.stdout)["subsets"]
    print({name: values["accuracy"] for name, values in subsets.items()})
    assert set(subsets) == {"image", "audio", "image+audio"}
    assert subsets["image+audio"]["accuracy"] > max(subsets["image"]["accuracy"], subsets["audio"]["accuracy"])


def pair(images: Path, clips: Path, target: Path, repeats: int) -> None:
    """Pair each clip with `repeats` pictures of the class of the same index."""
    pictures = pq.read_table(images).to_pylist()
    names = sorted({row["label"] for row in pictures})
    pools = {i: [row["image"] for row in pictures if row["label"] == name] for i, name in enumerate(names)}
    rows = []
    for number, clip in enumerate(pq.read_table(clips).to_pylist() * repeats):
        pool = pools[clip["digit"]]
        rows.append({"image": pool[number % len(pool)], "audio": clip["audio"], "label": str(clip["digit"])})
    pq.write_table(pa.Table.from_pylist(rows), target)
