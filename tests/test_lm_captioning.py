"""Language models say what is seen and heard: captions with several references, and answers to questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmhub.engine import train
from mmhub.errors import InputError, UsageError
from mmhub.evaluation import EvalOptions, evaluate
from tests.talk_tables import WORDS, chat_recipe, write_media
from tests.test_distributed import curve

WRITERS = {
    "transformer-lm": {"dim": 16, "depth": 1, "heads": 2},
    "lstm-lm": {"dim": 16},
}


def captions(folder: Path, kind: str, rows: int = 8) -> Path:
    """A table of media with two captions each, in a column called text: no question must be made of it."""
    write_media(folder)
    ending = {"image": "png", "audio": "flac"}[kind]
    lines = [
        {kind: f"media/{n % 4}.{ending}", "text": [f"a {WORDS[n % 4]}", f"one {WORDS[n % 4]}"]} for n in range(rows)
    ]
    path = folder / f"{kind}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def captioner(folder: Path, kind: str, use: str = "transformer-lm") -> dict[str, Any]:
    path = captions(folder, kind)
    table = chat_recipe(folder, {"max_steps": 2}) | {"task": "captioning"}
    table["model"]["encoders"] = {kind: table["model"]["encoders"][kind]}
    table["model"]["decoder"] = {"use": use, "config": WRITERS[use]}
    return table | {"data": {"train": str(path), "valid": str(path), "target": "text"}}


@pytest.mark.parametrize(("kind", "use"), [("image", "transformer-lm"), ("audio", "lstm-lm")])
def test_a_language_model_learns_captions_of_what_is_seen_or_heard(tmp_path: Path, kind: str, use: str) -> None:
    run = train(captioner(tmp_path, kind, use), tmp_path / "run")
    model = run.load()
    assert dict(model.columns.inputs) == {kind: kind} and model.columns.target == "text"
    found = evaluate(model, tmp_path / f"{kind}.jsonl")
    assert {"bleu", "chrf", "cider", "loss"} <= set(found["metrics"]) and set(found["subsets"]) == {kind}
    assert found["metrics"]["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)
    (answer,) = model.predict([{kind: tmp_path / "media" / ("0.png" if kind == "image" else "0.flac")}])
    assert isinstance(answer["text"], str)


def test_a_caption_without_a_picture_is_no_row(tmp_path: Path) -> None:
    table = captioner(tmp_path, "image")
    lines = [json.loads(line) for line in (tmp_path / "image.jsonl").read_text().splitlines()]
    lines[1]["image"] = None
    (tmp_path / "image.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.raises(InputError, match=r"image\.jsonl row 2: none of image is given"):
        train(table, tmp_path / "run")
    table["data"]["on_error"] = "skip"
    assert train(table, tmp_path / "skipped").steps == 2


def test_a_target_that_is_no_text_is_named_before_training(tmp_path: Path) -> None:
    table = captioner(tmp_path, "image")
    lines = [json.loads(line) for line in (tmp_path / "image.jsonl").read_text().splitlines()]
    lines[2]["text"] = None
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    table["data"]["valid"] = str(tmp_path / "valid.jsonl")
    with pytest.raises(InputError, match=r"valid\.jsonl row 3, column 'text': the target is a NoneType, not a text"):
        train(table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_questions_about_pictures_are_answered_by_a_language_model(tmp_path: Path) -> None:
    write_media(tmp_path)
    rows = [
        {"image": f"media/{n % 4}.png" if n % 3 else None, "question": "which one", "answer": [WORDS[n % 4]] * 3}
        for n in range(8)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    table = chat_recipe(tmp_path, {"max_steps": 2}) | {"task": "visual-question-answering"}
    table["model"]["encoders"].pop("audio")
    run = train(table | {"data": {"train": str(path)}}, tmp_path / "run")
    model = run.load()
    assert len(curve(run.out)) == 2 and dict(model.columns.inputs) == {"image": "image", "text": "question"}
    found = evaluate(model, path)
    assert set(found["metrics"]) == {"vqa_accuracy", "exact_match", "loss"}
    assert {name: part["rows"] for name, part in found["subsets"].items()} == {"text": 3, "image+text": 5}
    blind = evaluate(model, path, options=EvalOptions(withhold=("image",), write=False))
    assert set(blind["subsets"]) == {"text"} and blind["rows"] == 8
    talks = [{"messages": [{"role": "user", "content": "which one"}, {"role": "assistant", "content": "one"}]}]
    assert set(evaluate(model, talks, inputs={"messages": "messages"})["subsets"]) == {"text"}


def test_text_without_anyone_to_read_it_is_still_refused(tmp_path: Path) -> None:
    table = captioner(tmp_path, "image")
    table["model"]["decoder"] = {"use": "seq2seq"}
    table["data"]["inputs"] = {"image": "image", "text": "text"}
    with pytest.raises(UsageError, match=r"data\.inputs feeds 'text', but the model has no such encoder"):
        train(table, tmp_path / "run")


@pytest.mark.slow
def test_a_pretrained_language_model_learns_captions(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 300, "n_positions": 64}
    table = captioner(tmp_path, "image")
    table["model"]["decoder"] = {"use": "transformers-lm", "config": {"config": config}}
    table["model"]["tokenizer"] = {"kind": "byte"}
    assert evaluate(train(table, tmp_path / "run").load(), tmp_path / "image.jsonl")["rows"] == 8
