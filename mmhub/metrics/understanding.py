"""Metrics of tagged words, of answers found in a text, and of how far scores can be trusted."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmhub.interfaces.spans import find_spans, holds_spans

BINS = 15

_Counts = tuple[int, int, int]  # right, predicted, true
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tagging(predictions: Sequence[Mapping[str, Any]], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Accuracy by word, and F1 by span or by label.

    Where all tags are of spans (B-PER and the like), precision, recall and F1 are those of the CoNLL shared tasks: a
    span is right if its label, start and end are, counted over all rows (Tjong Kim Sang and De Meulder 2003,
    arXiv:cs/0306050). Any other tags have an F1 averaged over the labels. `f1_by_label` is that of each alone.
    """
    pairs = [(list(p["tags"]), list(r)) for p, r in zip(predictions, references, strict=True)]
    words = [pair for guessed, true in pairs for pair in zip(guessed, true, strict=True)]
    right = sum(guess == tag for guess, tag in words)
    values: dict[str, Any] = {"accuracy": right / len(words) if words else 0.0}
    if holds_spans({tag for pair in words for tag in pair}):
        counts = _count((set(find_spans(guessed)), set(find_spans(true))) for guessed, true in pairs)
        hit, predicted, actual = (sum(count[i] for count in counts.values()) for i in range(3))
        values["precision"] = hit / predicted if predicted else 0.0
        values["recall"] = hit / actual if actual else 0.0
        values["f1"] = _f1((hit, predicted, actual))
    else:
        counts = _count(({(guess,)}, {(tag,)}) for guess, tag in words)
        values["f1"] = math.fsum(map(_f1, counts.values())) / len(counts) if counts else 0.0
    return values | {"f1_by_label": {label: _f1(counts[label]) for label in sorted(counts)}}


def answers(predictions: Sequence[Mapping[str, Any]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of words against the best of the right answers, as SQuAD measures them, between 0 and 1.

    Case, punctuation, articles and blanks do not count (Rajpurkar et al. 2016, arXiv:1606.05250). No right answer means
    that the empty text is the right one (2018, arXiv:1806.03822).
    """
    pairs = [(p["text"], list(r) or [""]) for p, r in zip(predictions, references, strict=True)]
    exact = [max(_normal(text) == _normal(right) for right in rights) for text, rights in pairs]
    f1 = [max(_overlap(_normal(text).split(), _normal(right).split()) for right in rights) for text, rights in pairs]
    return {"exact_match": sum(exact) / len(pairs), "f1": math.fsum(f1) / len(pairs)}


def calibration(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float]:
    """Expected calibration error: how far scores and the share of right answers are apart, 0 is best.

    Rows are put in 15 bins of equal width by their score; the differences of mean score and accuracy are averaged by
    the number of rows (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599). Nothing where answers have no score.
    """
    rows = [(p["score"], p["label"] == r) for p, r in zip(predictions, references, strict=True) if "score" in p]
    if any(math.isnan(score) for score, _ in rows):
        return {"ece": math.nan}
    bins: dict[int, list[tuple[float, bool]]] = {}
    for score, right in rows:
        bins.setdefault(min(max(math.ceil(score * BINS) - 1, 0), BINS - 1), []).append((score, right))
    gaps = [abs(math.fsum(score for score, _ in part) - sum(right for _, right in part)) for part in bins.values()]
    return {"ece": math.fsum(gaps) / len(rows)} if rows else {}


def _count(pairs: Iterable[tuple[set[Any], set[Any]]]) -> dict[str, _Counts]:
    """By label, which is the first of each thing's parts: how many are right, predicted and true."""
    hits: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    actual: Counter[str] = Counter()
    for guessed, true in pairs:
        hits.update(thing[0] for thing in guessed & true)
        predicted.update(thing[0] for thing in guessed)
        actual.update(thing[0] for thing in true)
    return {label: (hits[label], predicted[label], actual[label]) for label in predicted | actual}


def _f1(counts: _Counts) -> float:
    hit, predicted, actual = counts
    return 2 * hit / (predicted + actual) if predicted + actual else 0.0


def _normal(text: str) -> str:
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _overlap(guessed: list[str], true: list[str]) -> float:
    if not guessed or not true:
        return float(guessed == true)
    common = (Counter(guessed) & Counter(true)).total()
    return _f1((common, len(guessed), len(true)))
