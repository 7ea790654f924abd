"""Tagging, questions about a context and pairs of texts, from a recipe to answers: toys that need what they are for."""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mmhub import Model, evaluate, load, train
from mmhub.config import check_recipe
from mmhub.engine.calibration import calibrate
from mmhub.errors import InputError
from mmhub.metrics import measure
from mmhub.plugins import get_index

NAMES, PLACES = ["ada", "alan", "grace", "emmy"], ["paris", "oslo", "rome", "bonn"]
SETTINGS = {"batch_size": 16, "learning_rate": 3e-2, "weight_decay": 0.0, "device": "cpu", "eval_every": 10_000}
NO_DROPOUT = {"dropout": 0.0, "embedding_dropout": 0.0, "word_dropout": 0.0}
ENCODER = {"use": "lstm", "config": {"dim": 32, "embedding_dim": 16} | NO_DROPOUT}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained(folder: Path, task: str, rows: Sequence[Mapping[str, Any]], epochs: int, **parts: Any) -> Model:
    """Train on rows, and validate on the same ones: the toys ask whether it can be learned."""
    data = write(folder / "rows.jsonl", rows)
    table = {
        "task": task,
        "model": {"encoders": {"text": ENCODER}, "tokenizer": {"kind": "word"}} | parts.pop("model", {}),
        "data": {"train": data, "valid": data, "workers": 0} | parts.pop("data", {}),
        "train": SETTINGS | {"epochs": epochs} | parts,
    }
    train(table, folder / "run")
    return load(str(folder / "run" / "model"))


def tagged(count: int) -> list[dict[str, Any]]:
    """A name behind "dr" is a person, of one or two words; any other name is nothing."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        names = draw.sample(NAMES, 3)
        tokens, tags = ["then", names[0], "met"], ["O", "O", "O"]
        both = draw.random() < 0.5
        tokens += ["dr", *names[1 : 3 if both else 2], "there"]
        tags += ["O", "B-PER", *(["I-PER"] if both else []), "O"]
        rows.append({"tokens": tokens, "tags": tags})
    return rows


def test_spans_are_learned_from_words_and_found_in_text(tmp_path: Path) -> None:
    rows = tagged(64)
    model = trained(tmp_path, "tagging", rows, epochs=15)
    report = evaluate(model, str(tmp_path / "rows.jsonl"))
    assert report["metrics"]["f1"] == report["metrics"]["f1_by_label"]["PER"] == 1
    answers = model.predict([{"text": "then ada met dr alan emmy there"}, {"text": ["dr", "ada", "there"]}])
    assert answers[0]["words"] == ["then", "ada", "met", "dr", "alan", "emmy", "there"]
    (person,) = answers[0]["entities"]
    assert (person["label"], person["start"], person["end"], person["text"]) == ("PER", 4, 6, "alan emmy")
    assert [entity["text"] for entity in answers[1]["entities"]] == ["ada"]


def test_a_row_with_another_number_of_labels_than_words_stops_training_by_its_number(tmp_path: Path) -> None:
    rows = tagged(8)
    rows[5]["tags"] = rows[5]["tags"][:-1]
    with pytest.raises(InputError, match=r"rows.jsonl row 6, column 'tags': the text has \d word"):
        trained(tmp_path, "tagging", rows, epochs=1)


def asked(count: int) -> list[dict[str, Any]]:
    """The question says whether the person or the place is asked for; "why" is not answered."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        name, place, question = draw.choice(NAMES), draw.choice(PLACES), draw.choice(["who", "where", "why"])
        context = f"{name} went to {place} ."
        found = {"who": [name], "where": [place], "why": []}[question]
        answers = {"text": found, "answer_start": [context.index(text) for text in found]}
        rows.append({"question": f"{question} ?", "context": context, "answers": answers})
    return rows


def test_answers_are_found_in_the_context_where_there_are_any(tmp_path: Path) -> None:
    model = trained(tmp_path, "question-answering", asked(96), epochs=10)
    report = evaluate(model, str(tmp_path / "rows.jsonl"))
    assert (report["metrics"]["exact_match"], report["metrics"]["f1"]) == (1, 1)
    context = "grace went to oslo ."
    samples = [{"text": {"question": f"{word} ?", "context": context}} for word in ("who", "where", "why")]
    answers = model.predict(samples)
    assert [(a["text"], a["start"], a["end"]) for a in answers] == [
        ("grace", 0, 5), ("oslo", 14, 18), ("", None, None),
    ]  # fmt: skip
    assert all(answer["score"] > 0.5 for answer in answers)


def paired() -> list[dict[str, Any]]:
    """Entailed if both texts name the same colour: neither of them alone says anything."""
    colours, things = ["red", "blue"], ["ball", "car", "hat", "door"]
    return [
        {"premise": f"a {one} {thing}", "hypothesis": f"it is {other}", "label": "yes" if one == other else "no"}
        for one, other, thing in product(colours, colours, things)
    ]


PAIR = {"inputs": {"text": ["premise", "hypothesis"]}, "target": "label"}


def test_entailment_is_learned_from_both_texts_of_a_pair(tmp_path: Path) -> None:
    model = trained(tmp_path, "classification", paired() * 4, epochs=16, data=PAIR)
    assert evaluate(model, str(tmp_path / "rows.jsonl"))["metrics"]["accuracy"] == 1
    samples = [{"text": {"text": "a red hat", "text_pair": f"it is {colour}"}} for colour in ("red", "blue")]
    assert [answer["label"] for answer in model.predict(samples)] == ["yes", "no"]


def test_a_model_is_calibrated_on_held_out_rows_and_answers_as_before(tmp_path: Path) -> None:
    draw = random.Random(0)
    noisy = [row | {"label": draw.choice(["yes", "no"])} if draw.random() < 0.4 else row for row in paired() * 6]
    head = {"decoder": {"config": {"calibrate": True}}}
    model = trained(tmp_path, "classification", noisy[:48], epochs=4, data=PAIR, model=head)
    model.decoder.temperature = 0.1  # far too sure, whatever training came to
    held_out = write(tmp_path / "held-out.jsonl", noisy[48:])
    rows = [{"text": {"text": row["premise"], "text_pair": row["hypothesis"]}} for row in noisy[48:64]]
    before = model.predict(rows)
    found = calibrate(model, lambda: evaluate(model, held_out))
    assert found > 0.1
    after = load(str(model.save(tmp_path / "saved"))).predict(rows)
    assert [answer["label"] for answer in after] == [answer["label"] for answer in before]
    right = [row["label"] for row in noisy[48:64]]
    gaps = [measure(["calibration"], answers, right)["ece"] for answers in (before, after)]
    assert gaps[1] < gaps[0]


def test_the_recipes_in_the_document_are_valid() -> None:
    text = (Path(__file__).parents[1] / "docs" / "understanding.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    recipes = [tomllib.loads(block) for block in blocks if block.startswith("task")]
    assert [check_recipe(table).task for table in recipes] == ["classification", "tagging", "question-answering"]
    (head,) = (tomllib.loads(block)["model"]["decoder"] for block in blocks if not block.startswith("task"))
    assert get_index().find("decoder", head["use"]).load().Config(**head["config"]).calibrate
