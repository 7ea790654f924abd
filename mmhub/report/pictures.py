"""Pictures of numbers, as PNG: a confusion matrix, a calibration diagram, answers against the truth.

Drawn by matplotlib on figures of their own, so that nothing of a program that uses matplotlib itself is touched.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmhub.report.media import shorten

INK, SOFT, LINE = "#1d1f21", "#63676c", "#e2e2de"
BLUE, ORANGE = "#2a6fc9", "#d4571e"
MAX_NUMBERS, MAX_NAMES, MAX_POINTS = 30, 100, 5000


def draw_confusion(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> bytes:
    """Draw counts (V, V), a row for each true label; colours are shares of a row, which is the recall on the diagonal.

    Up to 30 labels have their counts written in, up to 100 their names.
    """
    counts = np.asarray(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(4.0 + 0.3 * len(labels), 20.0) if len(labels) <= MAX_NAMES else 12.0
    figure, axes = _figure(size + 1.2, size)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="answer", ylabel="truth")
    axes.spines[:].set(visible=True, color=LINE)
    font = 9 if len(labels) <= MAX_NUMBERS else 7
    if len(labels) <= MAX_NAMES:
        names = [shorten(label, 24) for label in labels]
        steep = max(map(len, names)) > 3
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(range(len(names)), names, fontsize=font, parse_math=False)
        axes.tick_params(length=0)
        if steep:
            for text in axes.get_xticklabels():
                text.set(rotation=90 if len(labels) > MAX_NUMBERS else 45, ha="center" if len(labels) > 30 else "right")
                text.set_rotation_mode("default" if len(labels) > MAX_NUMBERS else "anchor")
    if len(labels) <= MAX_NUMBERS:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.03, aspect=30, label="share of the true label's rows")
    bar.outline.set_visible(False)
    return _png(figure)


def draw_calibration(bins: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the share of right answers over the mean score of each bin, and how many rows it has."""
    figure, axes = _figure(5.2, 4.2)
    total = sum(entry["rows"] for entry in bins)
    width = 1 / 15
    middles = [(entry["from"] + entry["to"]) / 2 for entry in bins]
    axes.bar(middles, [entry["rows"] / total for entry in bins], width * 0.9, color=LINE, label="share of rows")
    axes.plot([0, 1], [0, 1], color=SOFT, linestyle=":", label="score = accuracy")
    points = [entry["score"] for entry in bins], [entry["accuracy"] for entry in bins]
    axes.plot(*points, color=BLUE, marker="o", markersize=4, label="accuracy")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score of the answer", ylabel="share that is right")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return _png(figure)


def draw_scatter(points: Sequence[tuple[float, float]]) -> bytes:
    """Draw answers over true values; of many points some, evenly spaced, so that the picture stays small."""
    figure, axes = _figure(5.2, 4.2)
    step = -(-len(points) // MAX_POINTS)
    values = np.asarray(points[::step], dtype=float)
    values = values[np.isfinite(values).all(1)]
    axes.scatter(values[:, 0], values[:, 1], s=10, color=BLUE, alpha=0.6, linewidths=0)
    if len(values):
        ends = [values.min(), values.max()]
        axes.plot(ends, ends, color=SOFT, linestyle=":")
    axes.set(xlabel="truth", ylabel="answer")
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=110, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()
