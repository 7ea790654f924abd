"""Captions of pictures and sounds, and answers to questions about pictures, from a recipe to texts on the command line.

The toys cannot be answered without what they are about: of the four pictures, colour and shape vary apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmhub.cli.main import main
from mmhub.config import check_recipe, dump_recipe

Run = Callable[..., dict[str, Any]]

COLOURS, SHAPES = ["red", "blue"], ["square", "circle"]
IMAGE = {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32, "augment": "none"}}
WRITER = {"use": "seq2seq", "config": {"dim": 32, "depth": 2, "heads": 2, "dropout": 0.0, "label_smoothing": 0.0}}
SETTINGS = {"batch_size": 8, "learning_rate": 5e-3, "weight_decay": 0.0, "device": "cpu", "eval_every": 10_000}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mmhub ARGS --json` in `tmp_path`, in this process; return its document."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> dict[str, Any]:
        with pytest.raises(SystemExit) as done:
            main([*map(str, args), "--json"])
        out, err = capsys.readouterr()
        assert done.value.code == 0, err
        document: dict[str, Any] = json.loads(out)
        return document

    return call


def draw(folder: Path) -> list[dict[str, str]]:
    """A picture of each coloured shape, as a file; the column `image` names it."""
    rows = []
    for colour, shape in product(COLOURS, SHAPES):
        image = Image.new("RGB", (32, 32), "white")
        pen = ImageDraw.Draw(image)
        (pen.rectangle if shape == "square" else pen.ellipse)((6, 6, 25, 25), fill=colour)
        image.save(folder / f"{colour}-{shape}.png")
        rows.append({"image": f"{colour}-{shape}.png", "colour": colour, "shape": shape})
    return rows


def write(folder: Path, task: str, rows: Sequence[Mapping[str, Any]], epochs: int, **encoders: Any) -> None:
    """Write the rows and a recipe that trains on them, and validates on the same ones: can it be learned?"""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {
        "task": task,
        "model": {"encoders": encoders, "decoder": WRITER, "tokenizer": {"kind": "word"}},
        "data": {"train": "rows.jsonl", "valid": "rows.jsonl", "workers": 0},
        "train": SETTINGS | {"epochs": epochs},
    }
    (folder / "recipe.toml").write_text(dump_recipe(check_recipe(table)))


def test_pictures_are_captioned(tmp_path: Path, run: Run) -> None:
    rows = [
        {"image": row["image"], "caption": [f"a {row['colour']} {row['shape']} on white", f"some {row['shape']}"]}
        for row in draw(tmp_path)
    ]
    write(tmp_path, "captioning", rows, epochs=40, image=IMAGE)
    run("train", "recipe.toml", "--out", "run", "-q")
    report = run("eval", "./run/model", "--data", "rows.jsonl")
    assert report["metrics"]["bleu"] == pytest.approx(100)
    assert "nrefs:2" in report["metrics"]["bleu_signature"] and report["metrics"]["cider"] > 4
    files = [part for row in rows for part in ("--image", row["image"])]
    answers = run("predict", "./run/model", *files)["predictions"]
    assert [answer["text"] for answer in answers] == [row["caption"][0] for row in rows]


@pytest.mark.slow
def test_questions_about_the_same_picture_are_answered(tmp_path: Path, run: Run) -> None:
    rows = [
        {"image": row["image"], "question": f"what {kind} is it", "answer": [row[kind], row[kind], "something"]}
        for row in draw(tmp_path)
        for kind in ("colour", "shape")
    ]
    text = {"use": "transformer", "config": {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0}}
    write(tmp_path, "visual-question-answering", rows, epochs=50, image=IMAGE, text=text)
    run("train", "recipe.toml", "--out", "run", "-q")
    report = run("eval", "./run/model", "--data", "rows.jsonl")
    assert report["metrics"]["exact_match"] == 1
    assert report["metrics"]["vqa_accuracy"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert set(report["subsets"]) == {"image+text"}
    given = [part for row in rows for part in ("--image", row["image"], "--text", row["question"])]
    answers = run("predict", "./run/model", *given)["predictions"]
    assert [answer["text"] for answer in answers] == [row["answer"][0] for row in rows]


@pytest.mark.slow
def test_sounds_are_captioned(tmp_path: Path, run: Run) -> None:
    import soundfile

    captions = {300: "a low tone", 1200: "a high tone", 0: "silence"}
    for pitch in captions:
        time = np.arange(4000) / 8000
        soundfile.write(tmp_path / f"{pitch}.wav", 0.5 * np.sin(2 * np.pi * pitch * time), 8000)
    rows = [{"audio": f"{pitch}.wav", "caption": caption} for pitch, caption in captions.items()]
    config = {"dim": 16, "depth": 1, "heads": 2, "sample_rate": 8000}
    write(tmp_path, "captioning", rows, epochs=40, audio={"use": "transformer", "config": config})
    run("train", "recipe.toml", "--out", "run", "-q")
    report = run("eval", "./run/model", "--data", "rows.jsonl")
    assert report["metrics"]["chrf"] == pytest.approx(100)
    answers = run("predict", "./run/model", "--audio", "1200.wav", "--audio", "0.wav")["predictions"]
    assert [answer["text"] for answer in answers] == ["a high tone", "silence"]
