"""`mmhub data show`: rows as they are, and what of their text is trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmhub.build import compose
from mmhub.cli.main import main
from mmhub.config import check_recipe, dump_recipe
from mmhub.model import Columns

Run = Callable[..., tuple[int, str, str]]
IMAGE = {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}}
AUDIO = {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}}
WRITER = {"use": "transformer-lm", "config": {"dim": 16, "depth": 1, "heads": 2}}
TALKS = [
    [
        {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "what is it ?"}]},
        {"role": "assistant", "content": "a cat", "weight": 0.5},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "audio", "audio": "cat.wav"}]},
        {"role": "assistant", "content": "a cat , too"},
    ],
    [{"role": "user", "content": "say yes"}, {"role": "assistant", "content": "yes"}],
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mmhub data show ARGS` in `tmp_path`, in this process; return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), "red").save("cat.png")
    soundfile.write("cat.wav", np.zeros(4000, np.float32), 8000)

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(["data", "show", *map(str, args)])
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return call


def write(folder: Path, task: str, rows: list[Any], data: Mapping[str, Any] | None = None, **model: Any) -> Path:
    """A recipe with its data."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"task": task, "model": {"tokenizer": {"kind": "word"}, "decoder": WRITER, **model}}
    table["data"] = {"train": "rows.jsonl", **(data or {})}
    path = folder / "recipe.toml"
    path.write_text(dump_recipe(check_recipe(table)))
    return path


def talks(folder: Path, **data: Any) -> Path:
    rows = [{"messages": talk} for talk in TALKS]
    return write(folder, "chat", rows, data, encoders={"image": IMAGE, "audio": AUDIO})


def texts(out: str) -> str:
    """What was shown of the first row, without blanks."""
    return "".join(out.split("\n\n")[0].split("\n", 1)[1].split())


def test_of_a_conversation_answers_are_trained_and_media_stand_where_they_are_read(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(talks(tmp_path), "--loss")
    assert code == 0 and "\x1b" not in out
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0].startswith("rows.jsonl row 1: 22 tokens, 8 trained, ")
    assert lines[1] == "<s> User:‹image 32x32 cat.png› what is it ?"  # noqa: RUF001
    assert lines[2] == "Assistant:[[ a cat </s>]] x0.5"
    assert lines[3] == "User: and‹audio 0.5 s cat.wav›"  # noqa: RUF001
    assert lines[4] == "Assistant:[[ a cat , too </s>]]"
    assert "Assistant:[[ yes </s>]]" in lines
    assert lines[-1].startswith("2 rows: 31 tokens, 10 trained (32 %), ") and lines[-1].endswith(" of media")


def test_spans_say_role_weight_and_medium_and_add_up(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(talks(tmp_path), "--loss", "--rows", 1, "--json", "--set", "model.tokenizer.kind=byte")
    document = json.loads(out)
    (row,) = document["rows"]
    spans = row["spans"]
    text = "<s>User: what is it ?\nAssistant: a cat</s>\nUser: and\nAssistant: a cat , too</s>\n"
    assert code == 0 and "".join(span["text"] for span in spans) == text
    trained = [(span["role"], span["text"], span["weight"]) for span in spans if span["trained"]]
    assert trained == [("assistant", " a cat</s>", 0.5), ("assistant", " a cat , too</s>", 1.0)]
    image, audio = (span["media"] for span in spans if span["media"])
    assert (image["type"], image["size"], image["name"]) == ("image", "32x32", "cat.png")
    assert (audio["type"], audio["size"], audio["name"]) == ("audio", "0.5 s", "cat.wav")
    assert row["media_tokens"] == image["tokens"] + audio["tokens"] == document["media_tokens"] > 2
    assert row["trained"] == len(" a cat , too") + len(" a cat") + 2 == document["trained"]
    assert row["tokens"] == len(text) - len("<s></s></s>") + 3
    assert [span["role"] for span in spans if span["media"]] == ["user", "user"]


@pytest.mark.parametrize(("plain", "coloured"), [("", True), ("1", False)])
def test_a_terminal_shows_what_is_trained_in_green(
    plain: str, coloured: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", plain)
    _, out, _ = run(write(tmp_path, "chat", [{"messages": TALKS[1]}]), "--loss")
    assert ("\x1b[1;32m yes </s>\x1b[0m" in out) is coloured and ("[[ yes </s>]]" in out) is not coloured


def test_control_characters_of_the_data_stay_out_of_a_terminal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = run(write(tmp_path, "language-modelling", [{"text": "a \x1b]0;b c"}]), "--loss")
    assert "\x1b" not in out and "\N{REPLACEMENT CHARACTER}]0;b" in out


def test_of_a_text_all_but_the_first_token_is_trained(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path, "language-modelling", [{"text": "one two"}, {"text": "three"}])
    code, out, _ = run(path, "--loss", "--rows", 1)
    assert code == 0 and out.startswith("rows.jsonl row 1: 4 tokens, 3 trained\n<s>[[ one two </s>]]\n")


def test_captions_and_answers_are_trained_after_pictures_and_questions(run: Run, tmp_path: Path) -> None:
    rows = [{"image": "cat.png", "question": "what ?", "answer": "a cat", "caption": ["a cat", "a cat", "red"]}]
    _, out, _ = run(write(tmp_path, "captioning", rows, encoders={"image": IMAGE}), "--loss")
    assert texts(out) == "<s>User:‹image32x32cat.png›Assistant:[[acat</s>]]"  # noqa: RUF001
    _, out, _ = run(write(tmp_path, "visual-question-answering", rows, encoders={"image": IMAGE}), "--loss")
    assert texts(out) == "<s>User:‹image32x32cat.png›what?Assistant:[[acat</s>]]"  # noqa: RUF001


def test_of_a_translation_the_target_is_trained(run: Run, tmp_path: Path) -> None:
    parts = {"encoders": {"text": {"use": "lstm", "config": {"dim": 16, "embedding_dim": 8}}}}
    writer = {"use": "seq2seq", "config": {"dim": 16, "depth": 1, "heads": 2}}
    path = write(tmp_path, "translation", [{"source": "ein Hund", "target": "a dog"}], decoder=writer, **parts)
    code, out, err = run(path, "--loss")
    assert code == 0, err
    assert out.startswith("rows.jsonl row 1: ") and "ein Hund[[a dog </s>]]" in out and " 3 trained" in out


def test_a_model_tells_what_it_would_learn_from_other_data(run: Run, tmp_path: Path) -> None:
    model = compose("chat", decoder=WRITER, tokenizer={"kind": "word"}, texts=["say yes no"])
    model.save(tmp_path / "model")
    (tmp_path / "more.jsonl").write_text(json.dumps({"messages": TALKS[1]}))
    code, out, err = run("more.jsonl", "--loss", "--model", "./model", "--inputs", "messages=messages")
    assert code == 0, err
    assert "Assistant:[[ yes </s>]]" in out


def test_columns_are_found_and_missed_as_in_an_evaluation(run: Run, tmp_path: Path) -> None:
    parts: Any = {"encoders": {"image": IMAGE}, "decoder": WRITER, "tokenizer": {"kind": "word"}, "texts": ["say yes"]}
    asked = compose("visual-question-answering", **parts)
    asked.columns = Columns({"image": "image", "text": "question"}, "answer")
    asked.save(tmp_path / "vqa")
    (tmp_path / "more.jsonl").write_text(json.dumps({"talk": TALKS[1]}))
    code, out, err = run("more.jsonl", "--loss", "--model", "./vqa", "--inputs", "messages=talk")
    assert code == 0 and "Assistant:[[" in out, err
    compose("chat", **parts).save(tmp_path / "chat")
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "cat.png", "question": "say", "answer": "yes"}))
    args = ["q.jsonl", "--loss", "--model", "./chat", "--inputs"]
    code, _, err = run(*args, "image=image")
    assert code == 2 and "no column of conversations is known" in err
    assert "--inputs messages=COL" in err and "--target-column" in err
    code, _, err = run(*args, "image=image,text=question")
    assert code == 2 and "target column" in err
    code, out, err = run(*args, "image=image,text=question", "--target-column", "answer")
    assert code == 0 and "[[" in out, err


def test_what_does_not_fit_is_said(run: Run, tmp_path: Path) -> None:
    path = talks(tmp_path)
    code, out, err = run(path, "--loss", "--rows", 1, "--set", "train.block_size=24")
    assert code == 0, err
    assert "2 messages left out: too long" in out and "too" not in texts(out)


def test_rows_that_cannot_be_read_stop_or_are_skipped(run: Run, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "say"}]}, {"messages": TALKS[1]}]
    path = write(tmp_path, "chat", rows)
    code, _, err = run(path, "--loss")
    assert code == 1 and "rows.jsonl row 1: the conversation does not end with an answer" in err
    code, out, err = run(path, "--loss", "--set", "data.on_error=skip")
    assert code == 0 and "rows.jsonl row 2" in out and "skipped: rows.jsonl row 1" in err


def test_what_trains_on_labels_has_no_trained_text(run: Run, tmp_path: Path) -> None:
    rows = [{"image": "cat.png", "label": "cat"}, {"image": "cat.png", "label": "dog"}]
    path = write(tmp_path, "classification", rows, {"target": "label"}, encoders={"image": IMAGE}, decoder={})
    code, _, err = run(path, "--loss")
    assert code == 2 and "a model for classification is not trained to write text: it learns the column 'label'" in err
    code, out, _ = run(path)
    assert code == 0 and out.startswith("2 rows\nROW               IMAGE    LABEL\n")


def test_a_table_is_shown_as_it_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "long " * 40 + ",x\nb,y\n")
    code, out, _ = run("a.csv", "--rows", 1)
    assert code == 0 and out.splitlines()[0] == "2 rows" and "…" in out and "y" not in out.split("x")[-1]
    _, out, _ = run("a.csv", "--json")
    assert json.loads(out)["first"][1] == {"where": "a.csv row 2", "values": {"text": "b", "label": "y"}}
    code, _, err = run("a.csv", "--loss")
    assert code == 2 and "--loss needs a recipe, or a model" in err
    code, _, err = run("a.csv", "--model", "./model", "--loss", "--set", "seed=1")
    assert code == 2 and "--set is about a recipe, and with --model no recipe is read" in err


def staged(folder: Path, task: str = "chat") -> Path:
    """A recipe whose data stands in its stages alone; only both together say a word twice, and so it is known."""
    for number, word in enumerate(("yes", ", yes"), 1):
        talk = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": word}]
        (folder / f"{number}.jsonl").write_text(json.dumps({"messages": talk, "text": f"say it {word}"}))
    stages = [{"parts": ["decoder"], "data": {"train": f"{number}.jsonl"}} for number in (1, 2)]
    table = {"task": task, "model": {"tokenizer": {"kind": "word", "min_frequency": 2}, "decoder": WRITER}}
    (folder / "recipe.toml").write_text(dump_recipe(check_recipe(table | {"train": {"stages": stages}})))
    return folder / "recipe.toml"


def test_of_stages_the_first_is_shown_or_another_by_a_model_that_knows_the_words_of_all(
    run: Run, tmp_path: Path
) -> None:
    path = staged(tmp_path)
    code, out, err = run(path, "--loss", "--set", "train.block_size=64")
    assert code == 0 and "1.jsonl row 1" in out and "Assistant:[[ yes </s>]]" in out, err
    code, out, err = run(path, "--loss", "--stage", 2)
    assert code == 0 and "2.jsonl row 1" in out and " yes </s>]]" in out, err
    code, out, err = run(path, "--stage", 2, "--json")
    assert code == 0 and json.loads(out)["first"][0]["where"] == "2.jsonl row 1", err
    code, _, err = run(path, "--stage", 3)
    assert code == 2 and "there is no stage 3: the recipe has 2 stages" in err


@pytest.mark.parametrize("task", ["chat", "language-modelling"])
def test_a_block_that_the_model_cannot_read_is_told_as_in_training(run: Run, tmp_path: Path, task: str) -> None:
    code, _, err = run(staged(tmp_path, task), "--loss", "--set", "train.block_size=99999")
    assert code == 2 and "train.block_size is 99999, and the model has a context of" in err
