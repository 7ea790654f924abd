"""Small conversations about pictures and sounds for tests, and recipes for them."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from tests.conftest import flac, png

WORDS = ["zero", "one", "two", "three"]
IMAGE = {"use": "timm", "config": {"architecture": "test_vit", "image_size": 32}}
AUDIO = {
    "use": "cnn",
    "config": {
        "sample_rate": 8000, "dim": 16, "channels": [4, 8], "dropout": 0.0, "mask_bands": 0, "mask_time": 0.0
    },
}  # fmt: skip


def write_media(folder: Path) -> None:
    (folder / "media").mkdir(parents=True, exist_ok=True)
    for label in range(4):
        (folder / f"media/{label}.png").write_bytes(png(label))
        (folder / f"media/{label}.flac").write_bytes(flac(label, 0.15 + 0.05 * label))


def said(role: str, *parts: Any) -> dict[str, Any]:
    """A message; a part is a text, or the path of a medium."""
    kinds = {".png": "image", ".flac": "audio"}
    found = [{"type": kinds.get(Path(part).suffix, "text")} for part in parts]
    return {
        "role": role,
        "content": [one | {one["type"]: part} for one, part in zip(found, parts, strict=True)],
    }


def conversation(number: int) -> list[dict[str, Any]]:
    """One of four kinds by its number: text alone, a picture, a sound, or two pictures and a sound in two turns."""
    label = number // 4 % 4
    image, audio, word = f"media/{label}.png", f"media/{label}.flac", WORDS[label]
    if number % 4 == 0:
        return [said("user", f"say {word}"), said("assistant", word)]
    if number % 4 == 1:
        return [said("user", image, "which picture"), said("assistant", word)]
    if number % 4 == 2:
        return [said("user", "which sound", audio), said("assistant", word)]
    first = [said("user", image, "which picture", "media/0.png"), said("assistant", word)]
    return [*first, said("user", "and which sound", audio), said("assistant", word)]


def write_talks(path: Path, rows: int = 16, column: str = "messages") -> Path:
    """A table of conversations beside its media."""
    write_media(path.parent)
    lines = [json.dumps({column: conversation(number)}) for number in range(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def chat_recipe(folder: Path, train: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    """A recipe for `write_talks(folder / "train.jsonl")` without anything random but the order of rows."""
    decoder = {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0, "word_dropout": 0.0, "max_length": 128}
    return {
        "task": "chat",
        "model": {
            "encoders": deepcopy({"image": IMAGE, "audio": AUDIO}),
            "decoder": {"use": "transformer-lm", "config": decoder},
            "tokenizer": {"kind": "word", "min_frequency": 1},
        },
        "data": {"train": str(folder / "train.jsonl")} | data,
        "train": {"max_steps": 3, "batch_size": 4, "log_every": 1, "learning_rate": 3e-3} | (train or {}),
    }
