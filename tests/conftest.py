"""Fixtures shared by the tests: small real media, a Hub on loopback, and the command line in and out of process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(os.environ.get("MMHUB_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests run in parallel processes: more threads than that only wait for each other. Their cache is their own."""
    os.environ["MMHUB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of them would compile thousands of modules again
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches, registries or tokens, or reaches the real Hub."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hf" / "hub"))
    monkeypatch.setenv("MMHUB_CONFIG", str(home / "config"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))


def png(digit: int, size: int = 16) -> bytes:
    """A picture that shows its class by the place of a bright square."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(digit).integers(0, 40, (size, size, 3)).astype(np.uint8)
    row, column = divmod(digit % 4, 2)
    half = size // 2
    pixels[row * half : (row + 1) * half, column * half : (column + 1) * half] += 200
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def flac(digit: int, seconds: float = 0.2, rate: int = 8000) -> bytes:
    """A tone whose pitch tells its class."""
    import numpy as np
    import soundfile

    time = np.arange(int(seconds * rate)) / rate
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * (300 + 400 * (digit % 4)) * time), rate, format="FLAC")
    return file.getvalue()


def make_table(path: Path, rows: int, *, missing: bool = False, labels: int = 4) -> Path:
    """A parquet of (image, audio, text, label) rows in which each input alone tells the label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = ["good", "bad", "blue", "loud"]
    table = []
    for i in range(rows):
        label = i % labels
        image = {"bytes": png(label), "path": f"{i}.png"}
        audio = {"bytes": flac(label, 0.15 + 0.05 * (i % 3)), "path": f"{i}.flac"}
        row: dict[str, Any] = {"image": image, "audio": audio, "text": f"a {words[label]} thing {i % 3}"}
        if missing and i % 3 == 1:
            row["image"] = None
        if missing and i % 3 == 2:
            row["audio"] = None
        table.append(row | {"label": f"c{label}"})
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.parquet (48 rows) and valid.parquet (16 rows), some inputs missing."""
    folder = tmp_path_factory.mktemp("tables")
    make_table(folder / "train.parquet", 48, missing=True)
    make_table(folder / "valid.parquet", 16)
    return folder


def recipe(tables: Path, **train: Any) -> dict[str, Any]:
    """A recipe for those tables that trains in a second: image and audio joined by attention."""
    return {
        "task": "classification",
        "model": {
            "encoders": {
                "image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}},
                "audio": {"use": "cnn", "config": {"sample_rate": 8000}},
            },
            "fusion": {"use": "attention", "config": {"dim": 32, "depth": 1, "heads": 2}},
        },
        "data": {
            "train": str(tables / "train.parquet"),
            "valid": str(tables / "valid.parquet"),
            "inputs": {"image": "image", "audio": "audio"},
            "target": "label",
        },
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3} | train,
    }


def three_modalities(*texts: str) -> Any:
    """An untrained image + audio + text model of real small parts, its words taken from `texts`."""
    from mmhub.build import compose

    return compose(
        encoders={
            "image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}},
            "audio": {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}},
            "text": {"use": "lstm", "config": {"dim": 16, "embedding_dim": 8}},
        },
        fusion={"use": "attention", "config": {"dim": 16, "depth": 1, "heads": 2}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        texts=texts,
    ).eval()


@pytest.fixture(scope="session")
def trained(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small trained image + audio model. Copy it before changing it."""
    from mmhub.engine import train

    return train(recipe(tables, epochs=3), tmp_path_factory.mktemp("runs") / "run").model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty Hub on loopback, set as HF_ENDPOINT."""
    from mmhub_hubserver import HubServer

    with HubServer(tmp_path / "hub-data") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server.url


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """huggingface_hub on line, without a proxy, its connections not those of another test; `tmp_path` is current."""
    from huggingface_hub import constants
    from huggingface_hub.utils._http import close_session

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    close_session()
    yield
    close_session()


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run `mmhub ARGS` in a fresh process in `tmp_path`."""

    def run(*args: object, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mmhub", *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=1800, check=False
        )

    return run
