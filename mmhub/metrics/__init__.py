"""Metrics from predictions and references, by name. All are exact over the whole data set, not averages of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmhub.metrics.captions import captions, exact_match, visual_answers
from mmhub.metrics.classification import accuracy, classes, labels, macro_f1, multilabel, regression, top
from mmhub.metrics.speech import speech
from mmhub.metrics.translation import translation
from mmhub.metrics.understanding import answers, calibration, tagging

# A value is a number, a text that says how one was computed, or the numbers of several things by name.
Metric = Callable[[Sequence[Mapping[str, Any]], Sequence[Any]], Mapping[str, Any]]


def _retrieval(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> Mapping[str, Any]:
    """Measured with numpy, which commands that only list do without."""
    from mmhub.metrics.retrieval import retrieval

    return retrieval(predictions, references)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "top": top,
    "f1": macro_f1,
    "multilabel": multilabel,
    "regression": regression,
    "translation": translation,
    "tagging": tagging,
    "answers": answers,
    "calibration": calibration,
    "retrieval": _retrieval,
    "speech": speech,
    "captions": captions,
    "visual_answers": visual_answers,
    "exact_match": exact_match,
}


def measure(
    names: Sequence[str], predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]
) -> dict[str, Any]:
    """Return the values of all the metrics called `names`; both sequences hold one entry a row, at least one."""
    return {key: value for name in names for key, value in METRICS[name](predictions, references).items()}


# By task what there is to say beyond numbers with a name.
DETAILS: dict[str, Metric] = {"classification": classes, "zero-shot-classification": classes, "multilabel": labels}


def explain(task: str, predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    """Return what lies behind the metrics of a task, such as those of each class; {} where there is nothing."""
    return dict(DETAILS[task](predictions, references)) if task in DETAILS and predictions else {}


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers alone, those of a table by "name.key".

    >>> flat({"perplexity": {"token": 8.0}, "bleu": 20.5, "bleu_signature": "nrefs:1"})
    {'perplexity.token': 8.0, 'bleu': 20.5}
    """
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": number for name, number in flat(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = value
    return found
