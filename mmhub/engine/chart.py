"""A line chart as one SVG element: no library, no script; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_MOST = 400  # points a curve keeps; longer ones become means between their extremes
_WIDTH, _HEIGHT = 480.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 14.0, 26.0


@dataclass(frozen=True)
class Curve:
    """Values by step."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(title: str, curves: Sequence[Curve], last: float = 0.0, marks: Sequence[float] = ()) -> str:
    """Return the chart as a `figure` element, '' without a finite point.

    Steps go from 0 to `last`, or as far as the curves; a dashed line stands at each step in `marks`.
    """
    shown = [Curve(curve.name, _finite(curve.points)) for curve in curves]
    shown = [curve for curve in shown if curve.points]
    if not shown:
        return ""
    frame = _Frame([point for curve in shown for point in curve.points], last)
    lines = [part for number, curve in enumerate(shown) for part in _draw(curve, frame, number)]
    dashes = [
        f'<line class="mark" x1="{frame.x(step):.1f}" x2="{frame.x(step):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        for step in marks
    ]
    box = f'viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(title)}"'
    key = "".join(f'<span class="key c{number}">{escape(curve.name)}</span>' for number, curve in enumerate(shown))
    now = ", ".join(short(curve.points[-1][1]) for curve in shown)
    caption = f"<b>{escape(title)}</b><span>{key if len(shown) > 1 else ''}<em>{now}</em></span>"
    inside = "".join([*frame.axes(), *dashes, *lines])
    return f"<figure><figcaption>{caption}</figcaption><svg {box}>{inside}</svg></figure>"


def short(value: float) -> str:
    """Write a number in few characters.

    >>> [short(value) for value in (0, 0.00012, 0.51234, 12, 15300, 2.5e9, 9.9e14)]
    ['0', '1.2e-4', '0.5123', '12', '15.3k', '2.5G', '990T']
    """
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e15):
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}"


class _Frame:
    """Where values lie on the paper."""

    def __init__(self, points: Sequence[tuple[float, float]], last: float) -> None:
        self._last = max(last, *(x for x, _ in points), 1.0)
        self.steps = [step for step in _ticks(0.0, self._last, 5) if step <= self._last]
        self.values = _ticks(min(y for _, y in points), max(y for _, y in points), 4)

    def x(self, step: float) -> float:
        return _LEFT + min(step / self._last, 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values[0], self.values[-1]
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> list[str]:
        found = []
        for value in self.values:
            y = self.y(value)
            found.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            found.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
        for step in self.steps:
            x = self.x(step)
            side = "end" if x > _WIDTH - _RIGHT - 14 else "middle"
            found.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{side}">{short(step)}</text>')
        return found


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from below `low` to above `high`, about `count` of them, at least two.

    >>> _ticks(0.13, 0.97, 4)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> _ticks(3, 3, 4)[0] < 3 < _ticks(3, 3, 4)[-1]
    True
    """
    if high - low <= abs(high) * 1e-9:
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next((size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999), 10 * power)
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [number * gap for number in range(first, max(last, first + 1) + 1)]


def _draw(curve: Curve, frame: _Frame, number: int) -> list[str]:
    parts, points = [], list(curve.points)
    if len(points) > _MOST:
        groups = [points[i * len(points) // _MOST : (i + 1) * len(points) // _MOST] for i in range(_MOST)]
        points = [(group[-1][0], math.fsum(y for _, y in group) / len(group)) for group in groups]
        above = [(group[-1][0], max(y for _, y in group)) for group in groups]
        below = [(group[-1][0], min(y for _, y in group)) for group in groups]
        parts.append(f'<polygon class="band c{number}" points="{_places(above + below[::-1], frame)}"/>')
    parts.append(f'<polyline class="line c{number}" points="{_places(points, frame)}"/>')
    if len(points) <= 30:
        for step, value in points:
            label = f"<title>{escape(curve.name)} {value:.6g} at step {step:.0f}</title>"
            x, y = frame.x(step), frame.y(value)
            parts.append(f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3">{label}</circle>')
    return parts


def _places(points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    return " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in points)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(y)]
