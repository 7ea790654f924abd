"""What a report says: the numbers of report.json, and the examples and pictures that the page adds to them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mmhub import __version__
from mmhub.data.parts import without_secrets
from mmhub.evaluation import Answered
from mmhub.metrics.understanding import BINS
from mmhub.model import Model
from mmhub.report.media import Shelf, shorten, without_folders
from mmhub.report.mistakes import Section, find_mistakes
from mmhub.report.pictures import draw_calibration, draw_scatter
from mmhub.report.searches import Direction, find_searches

FORMAT = 1
MAX_UNREADABLE = 50  # unreadable rows that are listed


@dataclass
class Content:
    """A report: `numbers` are those of report.json; the rest is shown on the page alone."""

    numbers: dict[str, Any]
    mistakes: Section | None = None
    searches: Sequence[Direction] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)  # by title, PNG

    @property
    def labels(self) -> list[str]:
        return [entry["label"] for entry in self.numbers.get("details", {}).get("classes", ())]

    @property
    def confusion(self) -> list[list[int]] | None:
        return self.numbers.get("details", {}).get("confusion")


def describe(model: Model, report: Mapping[str, Any], answered: Answered | None, data: str) -> Content:
    """Collect what there is to say about an evaluation; without `answered`, the numbers alone."""
    name = str(report["name"])
    numbers: dict[str, Any] = {
        "mmhub_report": FORMAT,
        **report,
        "name": Path(name).name if Path(name).is_absolute() else name,
        "data": data,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(model),
        "unreadable": [shorten(without_folders(without_secrets(text))) for text in answered.skipped[:MAX_UNREADABLE]]
        if answered
        else [],
    }
    if answered is None:
        return Content(numbers)
    shelf = Shelf(answered.rows, answered.inputs, answered.policy)
    content = Content(numbers)
    if model.task.paired:
        content.searches = find_searches(answered, shelf)
        numbers["searches"] = [direction.facts() for direction in content.searches]
    elif answered.answers:
        content.mistakes = find_mistakes(model.task.name, answered, shelf)
        if content.mistakes is not None:
            numbers["mistakes"] = [example.facts for example in content.mistakes.examples]
    content.pictures = _draw(model.task.name, numbers, answered)
    return content


def versions(model: Model) -> dict[str, str]:
    """Versions of Python, torch, mmhub and the plugins that a model is made of."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__, "mmhub": __version__}
    return found | {part.distribution: part.version for part in model.sources.values()}


def calibration_bins(answers: Sequence[tuple[int, Mapping[str, Any], Any]]) -> list[dict[str, Any]]:
    """Rows by their score, in 15 bins of equal width: how many, their mean score and the share that is right.

    The same bins as those of the metric `ece`, which is the mean of |score - accuracy| by rows; without
    empty ones.
    """
    found = []
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        part = [
            (p["score"], p["label"] == truth)
            for _, p, truth in answers
            if "score" in p and (low < p["score"] <= high or (number == 0 and p["score"] <= 0))
        ]
        if part:
            score, right = (sum(column) / len(part) for column in zip(*part, strict=True))
            found.append({"from": low, "to": high, "rows": len(part), "score": score, "accuracy": right})
    return found


def _draw(task: str, numbers: dict[str, Any], answered: Answered) -> dict[str, bytes]:
    if task == "regression" and answered.answers:
        points = [(float(truth), float(p["value"])) for _, p, truth in answered.answers]
        return {"Answers and truth": draw_scatter(points)}
    if "ece" not in numbers["metrics"]:
        return {}
    bins = numbers["calibration"] = calibration_bins(answered.answers)
    return {"Calibration": draw_calibration(bins)} if bins else {}
