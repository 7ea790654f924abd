"""index.html: the report as one page that needs nothing else, filled in by Jinja, which escapes whatever rows hold."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmhub.metrics import flat
from mmhub.report.content import Content
from mmhub.report.media import shorten

_TILES = 6
_TABLE = 200  # labels listed on the page; all are in report.json
_ABOUT = {
    "accuracy": "share of rows whose answer is right",
    "ece": "expected calibration error: how far scores and the share of right answers are apart, 0 is best",
    "f1": "harmonic mean of precision and recall",
    "loss": "what training makes small",
    "wer": "word error rate: wrong, missing and added words by the words of the reference",
    "cer": "the same of characters",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "r2": "share of the variance that is explained",
}


def write_page(content: Content, confusion: bytes | None) -> str:
    """Return the page of a report; `confusion` is the picture of the confusion matrix, if there is one."""
    from jinja2 import Environment, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "png": _png, "short": shorten}
    numbers = content.numbers
    classes = sorted(numbers.get("details", {}).get("classes", ()), key=lambda entry: (entry["f1"], entry["label"]))
    pictures = ({"Confusion matrix": confusion} if confusion else {}) | dict(content.pictures)
    return environment.from_string((folder / "page.html").read_text("utf-8")).render(
        numbers=numbers,
        style=(folder / "page.css").read_text("utf-8"),
        tiles=list(flat(numbers["metrics"]).items())[:_TILES],
        metrics=_metrics(numbers),
        subsets=_subsets(numbers),
        signatures=_signatures(numbers),
        classes=classes[:_TABLE],
        more_classes=len(classes) - len(classes[:_TABLE]),
        averaged=any("average_precision" in entry for entry in classes),
        pictures=pictures,
        mistakes=content.mistakes,
        searches=content.searches,
    )


def number(value: Any) -> str:
    """Write a number for people: counts as they are, others with four decimals.

    >>> number(12), number(0.5), number(12345.678), number(1e-7), number(float("nan")), number("a")
    ('12', '0.5000', '12345.6780', '1e-07', 'nan', 'a')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.3g}"


def _subsets(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The subsets that differ from all rows: of one modality alone its subset is everything."""
    subsets = numbers.get("subsets", {})
    return dict(subsets) if len(subsets) > 1 else {}


def _metrics(numbers: Mapping[str, Any]) -> list[tuple[str, str, list[Any]]]:
    """A line for each metric: its name, what it is, and its value on all rows and on each subset."""
    columns = [flat(numbers["metrics"]), *(flat(values) for values in _subsets(numbers).values())]
    names = dict.fromkeys(name for column in columns[:1] for name in column)
    return [(name, _about(name), [column.get(name) for column in columns]) for name in names]


def _about(name: str) -> str:
    if name.startswith("top") and name[3:].isdigit():
        return f"share of rows whose true label is among the {name[3:]} with the highest scores"
    return _ABOUT.get(name, "")


def _signatures(numbers: Mapping[str, Any]) -> dict[str, str]:
    """How metrics were computed, where they say so."""
    said = {key.removesuffix("_signature"): text for key, text in numbers["metrics"].items() if isinstance(text, str)}
    return said | ({"definition": str(numbers["definition"])} if "definition" in numbers else {})


def _png(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
