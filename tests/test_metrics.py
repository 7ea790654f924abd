"""Metrics agree with scikit-learn."""

from __future__ import annotations

import random

import pytest
from sklearn import metrics as reference
from sklearn.preprocessing import MultiLabelBinarizer

from mmhub.interfaces import TASKS
from mmhub.metrics import METRICS, measure

LABELS = ["a", "b", "c", "rare"]


def labels(count: int, seed: int, names: list[str]) -> list[str]:
    return random.Random(seed).choices(names, weights=range(len(names), 0, -1), k=count)


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_and_macro_f1_agree_also_for_labels_that_only_occur_on_one_side(seed: int) -> None:
    true, guessed = labels(60, seed, LABELS[:3]), labels(60, seed + 9, LABELS[1:])
    found = measure(["accuracy", "f1"], [{"label": label} for label in guessed], true)
    assert set(guessed) - set(true)
    assert set(true) - set(guessed)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(true, guessed))
    assert found["f1"] == pytest.approx(reference.f1_score(true, guessed, average="macro", zero_division=0))


@pytest.mark.parametrize("seed", range(4))
def test_multilabel_scores_agree(seed: int) -> None:
    draw = random.Random(seed)
    true = [draw.sample(LABELS[:3], draw.randint(0, 3)) for _ in range(50)]
    guessed = [draw.sample(LABELS[1:], draw.randint(0, 3)) for _ in range(50)]
    found = measure(["multilabel"], [{"labels": row} for row in guessed], true)
    binary = MultiLabelBinarizer(classes=LABELS)
    pair = binary.fit_transform(true), binary.fit_transform(guessed)
    assert found["f1"] == pytest.approx(reference.f1_score(*pair, average="micro", zero_division=0))
    assert found["f1_macro"] == pytest.approx(reference.f1_score(*pair, average="macro", zero_division=0))
    assert found["exact_match"] == pytest.approx(reference.accuracy_score(*pair))


def test_multilabel_without_any_label_is_zero_and_exact() -> None:
    assert measure(["multilabel"], [{"labels": []}], [[]]) == {"f1": 0.0, "f1_macro": 0.0, "exact_match": 1.0}


def test_a_repeated_label_counts_once() -> None:
    assert measure(["multilabel"], [{"labels": ["a", "a"]}], [["a"]])["f1"] == 1.0


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_regression_errors_agree_also_far_from_zero(offset: float) -> None:
    draw = random.Random(1)
    true = [offset + draw.gauss(0, 3) for _ in range(80)]
    guessed = [value + draw.gauss(0, 1) for value in true]
    found = measure(["regression"], [{"value": value} for value in guessed], true)
    assert found["mse"] == pytest.approx(reference.mean_squared_error(true, guessed))
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(true, guessed))
    assert found["r2"] == pytest.approx(reference.r2_score(true, guessed))


def test_r2_is_zero_where_the_references_do_not_vary() -> None:
    assert measure(["regression"], [{"value": 2.0}, {"value": 3.0}], [2.0, 2.0])["r2"] == 0.0


def test_thousands_of_labels_are_counted() -> None:
    true = [str(i % 5000) for i in range(20_000)]
    assert measure(["f1"], [{"label": label} for label in true], true) == {"f1": 1.0}
    assert measure(["multilabel"], [{"labels": [label]} for label in true], [[label] for label in true])["f1"] == 1.0


def test_predictions_and_references_must_pair_up() -> None:
    with pytest.raises(ValueError, match="zip"):
        measure(["accuracy"], [{"label": "a"}], ["a", "b"])


def test_every_task_names_metrics_that_exist() -> None:
    assert {name for task in TASKS.values() for name in task.metrics} <= set(METRICS)
