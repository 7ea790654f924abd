"""Scores of single labels, confusion matrices and top-k, beside scikit-learn's."""

from __future__ import annotations

import random
from typing import Any

import pytest
from sklearn import metrics as reference

from mmhub.build import compose
from mmhub.evaluation import Answered, EvalOptions, evaluate
from mmhub.metrics import classification, explain, measure
from mmhub.metrics.classification import average_precision
from mmhub.model import Model

LABELS = ["10", "2", "cat", "dog", "emu", "fox", "gnu"]


def guesses(count: int, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    draw = random.Random(seed)
    return [{"label": draw.choice(LABELS[1:])} for _ in range(count)], draw.choices(LABELS[:6], k=count)


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_each_label_and_the_confusion_matrix_agree(seed: int) -> None:
    predictions, truth = guesses(80, seed)
    found = explain("classification", predictions, truth)
    labels = [entry["label"] for entry in found["classes"]]
    assert labels == ["2", "10", "cat", "dog", "emu", "fox", "gnu"], (
        "numbers by value, also those never or only guessed"
    )
    answers = [p["label"] for p in predictions]
    expected = reference.precision_recall_fscore_support(truth, answers, labels=labels, zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [entry[name] for entry in found["classes"]] == pytest.approx(column.tolist()), name
    assert found["confusion"] == reference.confusion_matrix(truth, answers, labels=labels).tolist()


def test_a_matrix_of_very_many_labels_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "MAX_CONFUSION", 3)
    for labels, there in (("abc", True), ("abcd", False)):
        found = explain("classification", [{"label": one} for one in labels], list(labels))
        assert ("confusion" in found) is there
        assert len(found["classes"]) == len(labels)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_agrees_also_where_scores_are_equal(seed: int) -> None:
    draw = random.Random(seed)
    rows = [(draw.randint(0, 6) / 6, draw.random() < 0.3) for _ in range(60)]
    expected = reference.average_precision_score([right for _, right in rows], [score for score, _ in rows])
    assert average_precision(rows) == pytest.approx(expected)


def test_the_average_precision_of_a_label_that_no_row_has_is_zero() -> None:
    assert average_precision([(0.5, False)]) == 0.0
    assert average_precision([]) == 0.0


def test_labels_of_several_a_row_have_scores_each() -> None:
    predictions = [
        {"labels": ["a"], "scores": {"a": 0.9, "b": 0.2, "c": 0.1}},
        {"labels": ["a", "b"], "scores": {"a": 0.6, "b": 0.7, "c": 0.0}},
    ]
    a, b, c = explain("multilabel", predictions, [["a", "b"], ["b"]])["classes"]
    assert a == {"label": "a", "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1, "average_precision": 1.0}
    assert (b["precision"], b["recall"], b["support"], b["average_precision"]) == (1.0, 0.5, 2, 1.0)
    assert (c["label"], c["f1"], c["support"]) == ("c", 0.0, 0), "a label that the model knows and nobody named"
    bare = explain("multilabel", [{"labels": ["a"]}], [["a"]])["classes"]
    assert "average_precision" not in bare[0], "without scores there is none"


def test_a_row_counts_where_its_label_is_among_the_best() -> None:
    rows = [{"label": "a", "top": ["a", "b"]}, {"label": "b", "top": ["b", "c"]}]
    assert measure(["top"], rows, ["b", "a"]) == {"top2": 0.5}
    assert measure(["top"], [{"label": "a"}], ["a"]) == {}, "with few labels there is nothing to count"


def test_other_tasks_have_no_details() -> None:
    assert explain("regression", [{"value": 1.0}], [1.0]) == {}


@pytest.fixture(scope="module")
def model() -> Model:
    return compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 4}}},
        decoder={"use": "classification", "config": {"labels": LABELS}},
        texts=["a b c d"],
    ).eval()


ROWS = [{"text": f"{'abcd'[i % 4]} {'dcab'[i % 3]}", "label": LABELS[i % 7]} for i in range(21)]


def test_an_evaluation_counts_the_five_best_of_more_than_five_labels(model: Model) -> None:
    found = evaluate(model, ROWS, target="label")["metrics"]
    answers = model.predict([{"text": row["text"]} for row in ROWS])
    best = [sorted(p["scores"], key=p["scores"].__getitem__, reverse=True)[:5] for p in answers]
    assert found["top5"] == sum(row["label"] in five for row, five in zip(ROWS, best, strict=True)) / len(ROWS)
    assert 0 < found["accuracy"] < found["top5"] < 1
    two = evaluate(model, ROWS, target="label", options=EvalOptions(top=2))["metrics"]
    assert "top5" not in two
    assert two["top2"] < found["top5"]
    assert not [
        key for key in evaluate(model, ROWS, target="label", options=EvalOptions(top=7))["metrics"] if "top" in key
    ]


def test_an_evaluation_tells_details_and_hands_over_answers_only_when_asked(model: Model) -> None:
    kept: list[Answered] = []
    options = EvalOptions(details=True, keep=kept.append, batch_size=4, skip=True)
    rows = [*ROWS, {"text": "a", "label": "unheard of"}]
    found = evaluate(model, rows, target="label", options=options)
    assert "details" not in evaluate(model, ROWS, target="label")
    assert sum(map(sum, found["details"]["confusion"])) == found["rows"] == 21
    assert [row for row, *_ in kept[0].answers] == list(range(21))
    assert [truth for *_, truth in kept[0].answers] == [row["label"] for row in ROWS]
    assert all("scores" not in p and len(p["top"]) == 5 for _, p, _ in kept[0].answers)
    assert (dict(kept[0].inputs), kept[0].target) == ({"text": "text"}, "label")
    assert found["skipped"] == len(kept[0].skipped) == 1
    assert "unheard of" in kept[0].skipped[0]
