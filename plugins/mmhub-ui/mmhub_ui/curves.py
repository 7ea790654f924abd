"""Line charts of several runs as SVG: no library and no script; values show where the pointer is.

Unlike `mmhub.engine.chart`, whose charts stand in a page on one run, these have many runs in one frame, raw values
behind smoothed ones, and a scale by powers of ten.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmhub.engine.chart import short
from mmhub_ui.page import escaped

COLOURS = 8

_TINY = 1e-30  # what is nearer to 0 is drawn there
_POINTS = 300  # that a line keeps; of more, means
_STOPS = 40  # places at which the pointer finds values
_WIDTH, _HEIGHT = 480.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 10.0, 10.0, 24.0

STYLE = """
.curves { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)) }
.curves, .colours { --c0: #2a6fc9; --c1: #d4571e; --c2: #23845b; --c3: #8a4fb5; --c4: #a6821a; --c5: #c43b6b;
  --c6: #2a8c98; --c7: #6b7177 }
.dark .curves, .dark .colours { --c0: #6ea8ef; --c1: #f08a55; --c2: #5cc398; --c3: #bf93e0; --c4: #d9b656;
  --c5: #ef86ab; --c6: #67c3ce; --c7: #a9afb5 }
.curves figure { margin: 0; padding: 8px 10px 2px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--block-background-fill); min-width: 0 }
.curves figcaption { font-weight: 600; font-size: 14px; color: var(--body-text-color) }
.curves svg { display: block; width: 100%; height: auto; overflow: visible }
.curves text { fill: var(--body-text-color-subdued); font-size: 12px; font-variant-numeric: tabular-nums }
.curves .grid { stroke: var(--border-color-primary) }
.curves .mark { stroke: var(--body-text-color-subdued); stroke-dasharray: 3 4 }
.curves .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke: var(--c) }
.curves .faint { opacity: .28; stroke-width: 1.2 }
.curves .dashed { stroke-dasharray: 6 4 }
.curves .dot { fill: var(--c) }
.curves .stop rect.hit { fill: transparent } .curves .tip { visibility: hidden; pointer-events: none }
.curves .stop:hover .tip { visibility: visible }
.curves .tip rect { fill: var(--background-fill-primary); stroke: var(--border-color-primary) }
.curves .tip line { stroke: var(--body-text-color-subdued) } .curves .tip text { fill: var(--body-text-color) }
""" + "".join(f".k{number} {{ --c: var(--c{number}) }}\n" for number in range(COLOURS))


@dataclass(frozen=True)
class Line:
    """One line: `points` are (x, y). `colour` counts from 0; a faint one stands behind, and the pointer passes it."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False
    dashed: bool = False


def figure(title: str, lines: Sequence[Line], unit: str, *, log: bool = False, marks: Sequence[float] = ()) -> str:
    """Return the lines as a `figure`, '' where there is nothing to draw; `unit` names what x counts.

    With `log` the scale is by powers of ten where every value is positive. A dashed line stands at each of `marks`.
    """
    lines = [_thinned(line) for line in lines if line.points]
    if not lines:
        return ""
    frame = _Frame([point for line in lines for point in line.points], log)
    dashes = "".join(_upright(frame.x(x), "mark") for x in marks if x <= frame.last)
    drawn = "".join(_draw(line, frame) for line in sorted(lines, key=lambda line: not line.faint))
    now = ", ".join(f"{line.name} {short(line.points[-1][1])}" for line in lines if not line.faint)
    box = f'viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escaped(f"{title}: {now}")}"'
    inside = "".join([*frame.axes(), dashes, drawn, _stops([one for one in lines if not one.faint], frame, unit)])
    return f"<figure><figcaption>{escaped(title)}</figcaption><svg {box}>{inside}</svg></figure>"


def smoothed(points: Sequence[tuple[float, float]], weight: float) -> list[tuple[float, float]]:
    """Return running means: each value counts `weight` times as much as the one after it; 0 changes nothing.

    >>> smoothed([(0, 1.0), (1, 1.0), (2, 4.0)], 0.5)[:2]
    [(0, 1.0), (1, 1.0)]
    """
    found, mean, total = [], 0.0, 0.0
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        found.append((x, mean / total))
    return found


class _Frame:
    """Where values lie on the paper."""

    def __init__(self, points: Sequence[tuple[float, float]], log: bool) -> None:
        values = [y for _, y in points]
        self.log = log and min(values) > 0
        self.last = max(max(x for x, _ in points), 1e-9)
        self._ticks = _powers(min(values), max(values)) if self.log else _ticks(min(values), max(values), 4)

    def x(self, x: float) -> float:
        return _LEFT + min(max(x / self.last, 0.0), 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high, value = self._scaled(self._ticks[0]), self._scaled(self._ticks[-1]), self._scaled(value)
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def axes(self) -> list[str]:
        found = []
        for value in self._ticks:
            y = self.y(value)
            found.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            found.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
        for value in _ticks(0.0, self.last, 5):
            if value <= self.last:
                x = self.x(value)
                side = "end" if x > _WIDTH - _RIGHT - 14 else "middle"
                found.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{side}">{short(value)}</text>')
        return found


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from below `low` to above `high`.

    >>> _ticks(0.13, 0.97, 4)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if high - low <= max(abs(high), abs(low)) * 1e-9:
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    return [number * gap for number in range(math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high` on a scale by powers of ten.

    >>> _powers(0.03, 2.5)
    [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    powers = range(first, last + 1)
    found = [step * 10.0**power if power >= 0 else step / 10.0**-power for power in powers for step in steps]
    lower = max((tick for tick in found if tick <= low), default=found[0])
    upper = min((tick for tick in found if tick >= high and tick > lower), default=found[-1])
    return [tick for tick in found if lower <= tick <= upper]


def _thinned(line: Line) -> Line:
    points = [(x, y if abs(y) >= _TINY else 0.0) for x, y in line.points]
    if len(points) > _POINTS:
        groups = [points[i * len(points) // _POINTS : (i + 1) * len(points) // _POINTS] for i in range(_POINTS)]
        points = [(group[-1][0], math.fsum(y for _, y in group) / len(group)) for group in groups]
    return Line(line.name, points, line.colour % COLOURS, line.faint, line.dashed)


def _draw(line: Line, frame: _Frame) -> str:
    kind = f"k{line.colour}{' faint' if line.faint else ''}{' dashed' if line.dashed else ''}"
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    drawn = f'<polyline class="line {kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'
    if len(places) > 30 or line.faint:
        return drawn
    return drawn + "".join(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places)


def _upright(x: float, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<line{mark} x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'


def _stops(lines: Sequence[Line], frame: _Frame, unit: str) -> str:
    """What the pointer shows: for each strip of the frame the values that are nearest."""
    known = sorted({x for line in lines for x, _ in line.points})
    if len(known) > _STOPS:
        known = sorted({known[_nearest(known, frame.last * (i + 0.5) / _STOPS)] for i in range(_STOPS)} | {known[-1]})
    edges = [_LEFT, *((frame.x(a) + frame.x(b)) / 2 for a, b in pairwise(known)), _WIDTH - _RIGHT]
    return "".join(
        f'<g class="stop"><rect class="hit" x="{left:.1f}" y="0" width="{max(right - left, 0):.1f}" '
        f'height="{_HEIGHT}"/>{_tip(x, lines, frame, unit)}</g>'
        for x, left, right in zip(known, edges[:-1], edges[1:], strict=True)
    )


def _tip(x: float, lines: Sequence[Line], frame: _Frame, unit: str) -> str:
    at = frame.x(x)
    rows = [(f"{unit} {x:.6g}", "")]
    for line in lines:
        y = line.points[_nearest([one for one, _ in line.points], x)][1]
        rows.append((f"{_cut(line.name)} {y:.5g}", f"k{line.colour}"))
    width = 22 + 6.6 * max(len(text) for text, _ in rows)
    left = at - width - 8 if at > _WIDTH / 2 else at + 8
    box = f'<rect x="{left:.1f}" y="{_TOP}" width="{width:.1f}" height="{len(rows) * 16 + 8}" rx="4"/>'
    texts = "".join(
        (f'<circle class="dot {kind}" cx="{left + 10:.1f}" cy="{_TOP + 12 + 16 * row}" r="4"/>' if kind else "")
        + f'<text x="{left + 18:.1f}" y="{_TOP + 16 + 16 * row}">{escaped(text)}</text>'
        for row, (text, kind) in enumerate(rows)
    )
    return f'<g class="tip">{_upright(at)}{box}{texts}</g>'


def _cut(name: str) -> str:
    return name if len(name) <= 30 else f"…{name[-29:]}"


def _nearest(known: Sequence[float], x: float) -> int:
    place = bisect_left(known, x)
    if place and (place == len(known) or x - known[place - 1] <= known[place] - x):
        return place - 1
    return place
