"""Metrics of labels, sets of labels and numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from heapq import nlargest
from itertools import groupby
from typing import Any

MAX_CONFUSION = 1000  # labels above which a matrix of all pairs is too large to be of use


def accuracy(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float]:
    """Share of rows whose predicted label is the reference."""
    hits = sum(p["label"] == r for p, r in zip(predictions, references, strict=True))
    return {"accuracy": hits / len(references)}


def top(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float]:
    """Share of rows whose reference is among the best labels, as `{"top5": ...}`, by how many labels `top` lists.

    Nothing where there are no more labels than that, so that no row has a `top`.
    """
    rows = [(p["top"], r) for p, r in zip(predictions, references, strict=True) if "top" in p]
    return {f"top{len(rows[0][0])}": sum(r in best for best, r in rows) / len(rows)} if rows else {}


def best_labels(scores: Mapping[str, float], count: int) -> list[str]:
    """Return the labels with the highest scores, best first; of equal ones those listed first.

    >>> best_labels({"cat": 0.2, "dog": 0.5, "cow": 0.2, "emu": 0.1}, 2)
    ['dog', 'cat']
    """
    return nlargest(count, scores, key=scores.__getitem__)


def macro_f1(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float]:
    """F1 averaged over the labels that occur in references or predictions, each weighing the same."""
    counts = _counts(({p["label"]}, {r}) for p, r in zip(predictions, references, strict=True))
    return {"f1": _mean_f1(counts)}


def _counts(pairs: Iterable[tuple[set[Any], set[Any]]]) -> dict[Any, tuple[int, int, int]]:
    """How often each label is right, predicted, and true, from the predicted and true labels of each row."""
    hits: Counter[Any] = Counter()
    predicted: Counter[Any] = Counter()
    actual: Counter[Any] = Counter()
    for p, r in pairs:
        hits.update(p & r)
        predicted.update(p)
        actual.update(r)
    return {label: (hits[label], predicted[label], actual[label]) for label in predicted | actual}


def _mean_f1(counts: Mapping[Any, tuple[int, int, int]]) -> float:
    # fsum, because labels come in any order and the last digit must not depend on it
    return math.fsum(_f1(*c) for c in counts.values()) / len(counts) if counts else 0.0


def _f1(hit: int, predicted: int, actual: int) -> float:
    return 2 * hit / (predicted + actual) if predicted + actual else 0.0


def multilabel(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float]:
    """F1 over all (row, label) decisions, its mean over labels, and the share of rows with exactly the right set."""
    sets = [(set(p["labels"]), set(r)) for p, r in zip(predictions, references, strict=True)]
    counts = _counts(sets)
    micro = _f1(*(sum(c[i] for c in counts.values()) for i in range(3)))
    return {"f1": micro, "f1_macro": _mean_f1(counts), "exact_match": sum(p == r for p, r in sets) / len(sets)}


def classes(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    """Precision, recall, F1 and support of each label that occurs, and how often each is taken for which.

    "confusion" has a row for each true label and a column for each answer, in the order of "classes"; it is left out
    where there are more than 1000 labels.
    """
    pairs = Counter(zip(references, (p["label"] for p in predictions), strict=True))
    counts = _counts(({p["label"]}, {r}) for p, r in zip(predictions, references, strict=True))
    labels = _in_order(counts)
    found: dict[str, Any] = {"classes": [_class(label, *counts[label]) for label in labels]}
    if len(labels) <= MAX_CONFUSION:
        found["confusion"] = [[pairs[true, guess] for guess in labels] for true in labels]
    return found


def labels(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    """Precision, recall, F1, support and, where answers hold scores, average precision of each label on its own."""
    sets = [(set(p["labels"]), set(r)) for p, r in zip(predictions, references, strict=True)]
    counts = {label: (0, 0, 0) for p in predictions[:1] for label in p.get("scores", ())} | _counts(sets)
    found = []
    for label in _in_order(counts):
        entry = _class(label, *counts[label])
        scored = [
            (p["scores"][label], label in r)
            for p, (_, r) in zip(predictions, sets, strict=True)
            if label in p.get("scores", ())
        ]
        found.append(entry | ({"average_precision": average_precision(scored)} if scored else {}))
    return {"classes": found}


def average_precision(rows: Sequence[tuple[float, bool]]) -> float:
    """Area under precision over recall, from (score, is it right?) of each row: sum of (R_n - R_{n-1}) P_n.

    Over all thresholds n from the highest score down, without interpolation, rows of equal score together (Zhu 2004,
    "Recall, precision and average precision"; scikit-learn's `average_precision_score`). 0 if no row is right.

    >>> average_precision([(0.9, True), (0.8, False), (0.7, True)])
    0.8333333333333333
    """
    right, seen, area = 0, 0, 0.0
    total = sum(is_right for _, is_right in rows)
    for _, same in groupby(sorted(rows, key=lambda row: -row[0]), key=lambda row: row[0]):
        group = [is_right for _, is_right in same]
        right, seen = right + sum(group), seen + len(group)
        area += sum(group) * right / seen
    return area / total if total else 0.0


def _class(label: str, hit: int, predicted: int, actual: int) -> dict[str, Any]:
    return {
        "label": label,
        "precision": hit / predicted if predicted else 0.0,
        "recall": hit / actual if actual else 0.0,
        "f1": _f1(hit, predicted, actual),
        "support": actual,
    }


def regression(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float]:
    """Mean squared and absolute error, and R2 (the share of variance explained; 0 if the references do not vary)."""
    pairs = [(float(p["value"]), float(r)) for p, r in zip(predictions, references, strict=True)]
    mse = math.fsum((p - r) ** 2 for p, r in pairs) / len(pairs)
    mean = math.fsum(r for _, r in pairs) / len(pairs)
    variance = math.fsum((r - mean) ** 2 for _, r in pairs) / len(pairs)
    mae = math.fsum(abs(p - r) for p, r in pairs) / len(pairs)
    return {"mse": mse, "mae": mae, "r2": 1 - mse / variance if variance else 0.0}


def _in_order(labels: Iterable[str]) -> list[str]:
    from mmhub.interfaces.labels import label_order  # brings torch, which commands that only list do without

    return sorted(labels, key=label_order)
