"""Metrics of labels, sets of labels and numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def accuracy(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float]:
    """Share of rows whose predicted label is the reference."""
    hits = sum(p["label"] == r for p, r in zip(predictions, references, strict=True))
    return {"accuracy": hits / len(references)}


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


def regression(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float]:
    """Mean squared and absolute error, and R2 (the share of variance explained; 0 if the references do not vary)."""
    pairs = [(float(p["value"]), float(r)) for p, r in zip(predictions, references, strict=True)]
    mse = math.fsum((p - r) ** 2 for p, r in pairs) / len(pairs)
    mean = math.fsum(r for _, r in pairs) / len(pairs)
    variance = math.fsum((r - mean) ** 2 for _, r in pairs) / len(pairs)
    mae = math.fsum(abs(p - r) for p, r in pairs) / len(pairs)
    return {"mse": mse, "mae": mae, "r2": 1 - mse / variance if variance else 0.0}
