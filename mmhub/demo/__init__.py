"""The data behind `mmhub demo`: handwritten digits from scikit-learn paired with spoken digits shipped here."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPEECH = Path(__file__).with_name("spoken_digits.parquet")

RECIPE = """\
# What `mmhub demo` trains: which digit is drawn, spoken, or both?
task = "classification"
seed = 0

[model.encoders.image]
use = "timm"
config = { architecture = "test_resnet", image_size = 32 }   # 0.5 million parameters

[model.encoders.audio]
use = "cnn"
config = { sample_rate = 8000 }

[model.fusion]
use = "gated"

[data]
train = "train.parquet"
valid = "valid.parquet"
inputs = { image = "image", audio = "audio" }
target = "digit"

[train]
epochs = 8
batch_size = 16
learning_rate = 2e-3

[card]
license = "cc0-1.0"
summary = "Tells which digit, zero to nine, is drawn, spoken, or both. Made by `mmhub demo`."
"""


def make_tables(folder: Path, *, repeats: int = 3) -> dict[str, int]:
    """Write train, valid and test tables of (image, audio, digit) rows to `folder`; return their numbers of rows.

    Test voices do not occur in training, and no image occurs in two tables. Each training clip is paired `repeats`
    times with an image of the same digit.
    """
    images = _digit_images()
    clips = _clips()
    spoken = {split: [clip for clip in clips if clip["split"] == split] for split in ("train", "test")}
    voices = sorted({clip["voice"] for clip in spoken["train"]})
    held = set(voices[:: max(1, len(voices) // 2)][:2])  # two training voices choose the best epoch
    tables = {
        "train": _pairs([c for c in spoken["train"] if c["voice"] not in held], images["train"], repeats, seed=1),
        "valid": _pairs([c for c in spoken["train"] if c["voice"] in held], images["valid"], 2, seed=2),
        "test": _pairs(spoken["test"], images["test"], 2, seed=3),
    }
    for name, rows in tables.items():
        _write(folder / f"{name}.parquet", rows)
    return {name: len(rows) for name, rows in tables.items()}


def _digit_images() -> dict[str, dict[int, list[bytes]]]:
    """PNG files of scikit-learn's 1,797 handwritten digits, by table and digit."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    found: dict[str, dict[int, list[bytes]]] = {
        table: {digit: [] for digit in range(10)} for table in ("train", "valid", "test")
    }
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = io.BytesIO()
        small = Image.fromarray((pixels * (255 / 16)).astype(np.uint8), mode=None)
        small.resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
        table = {3: "valid", 4: "test"}.get(number % 5, "train")
        found[table][int(digit)].append(file.getvalue())
    return found


def _clips() -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(SPEECH).to_pylist()
    return rows


def _pairs(
    clips: Sequence[dict[str, Any]], images: dict[int, list[bytes]], repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Pair every clip with `repeats` images of its digit, going round the images before one is used again."""
    draw = random.Random(seed)
    pools = {digit: draw.sample(files, len(files)) for digit, files in images.items()}
    used = dict.fromkeys(pools, 0)
    rows = []
    for clip in list(clips) * repeats:
        digit = int(clip["digit"])
        pool = pools[digit]
        image = {"bytes": pool[used[digit] % len(pool)], "path": f"{digit}-{used[digit]}.png"}
        rows.append({"image": image, "audio": dict(clip["audio"]), "digit": str(digit)})
        used[digit] += 1
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
