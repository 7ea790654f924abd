"""Drawings of an explanation as SVG elements, made of numbers alone; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmhub.explain.heat import FAINT, place, signed, strength, strongest
from mmhub.explain.records import Attribution, Faithfulness
from mmhub.explain.sources import Wave

_SEEN = 0.8  # opacity of full colour
_BINS = 300  # of a waveform
_HEIGHT = 100.0  # of a waveform, in units of its drawing


def patches(attribution: Attribution, scale: float, number: str, uri: str, refers: bool, sharp: bool) -> str:
    """A picture under the colours of its patches. It is in the page once, and referred to after that."""
    wide, high = attribution.size if len(attribution.size) == 2 else _bounds(attribution)
    box = f'width="{wide:g}" height="{high:g}"'
    image = ""
    if uri:
        pixels = ' class="sharp"' if sharp else ""
        image = f'<image id="{number}" href="{uri}" {box} preserveAspectRatio="none"{pixels}/>'
    elif refers:
        image = f'<use href="#{number}"/>'
    heat = []
    for at, piece in enumerate(attribution.pieces):
        value = strength(piece.score, scale)
        if piece.box is None or not all(map(math.isfinite, piece.box)):
            continue
        left, top, right, bottom = piece.box
        side, seen = ("for" if value > 0 else "against"), (abs(value) if abs(value) >= FAINT else 0)
        told = f"<title>{signed(piece.score)}, {place(attribution, at)}</title>"
        heat.append(
            f'<rect class="{side}" x="{left:g}" y="{top:g}" width="{max(right - left, 0):g}" '
            f'height="{max(bottom - top, 0):g}" fill-opacity="{seen * _SEEN:.3g}">{told}</rect>'
        )
    label = f"strongest: {_said(attribution)}"
    return (
        f'<svg viewBox="0 0 {wide:g} {high:g}" role="img" aria-label="picture; {label}">'
        f'<g class="plain">{image}</g><g class="heat">{"".join(heat)}</g></svg>'
    )


def _bounds(attribution: Attribution) -> tuple[float, float]:
    boxes = [piece.box for piece in attribution.pieces if piece.box is not None]
    return max((box[2] for box in boxes), default=1.0), max((box[3] for box in boxes), default=1.0)


def _said(attribution: Attribution) -> str:
    """The strongest pieces in words, without anything that a user wrote."""
    found = [f"{place(attribution, at)} {signed(attribution.pieces[at].score)}" for at in strongest(attribution, 3)]
    return "; ".join(found) or "none"


def wave(attribution: Attribution, scale: float, sound: Wave | None) -> str:
    """A waveform over the colours of its frames; without the sound itself, the colours alone."""
    heard = len(sound.samples) / sound.rate if sound else 0.0
    end = heard or max([*attribution.size[:1], *(piece.end for piece in attribution.pieces)], default=0.0) or 1.0
    heat = []
    for at, piece in enumerate(attribution.pieces):
        value = strength(piece.score, scale)
        left, right = piece.start / end * _BINS, min(piece.end / end, 1.0) * _BINS
        if right <= left:
            continue
        side, seen = ("for" if value > 0 else "against"), (abs(value) if abs(value) >= FAINT else 0)
        heat.append(
            f'<rect class="{side}" x="{left:.2f}" y="0" width="{right - left:.2f}" height="{_HEIGHT:g}" '
            f'fill-opacity="{seen * _SEEN:.3g}"><title>{signed(piece.score)}, {place(attribution, at)}</title></rect>'
        )
    line = f'<polygon class="wave" points="{_outline(sound)}"/>' if sound else ""
    return (
        f'<svg viewBox="0 0 {_BINS} {_HEIGHT:g}" preserveAspectRatio="none" data-seconds="{end:.4f}" role="img" '
        f'aria-label="sound; strongest: {_said(attribution)}">{"".join(heat)}{line}'
        f'<line class="head" x1="0" x2="0" y1="0" y2="{_HEIGHT:g}"/></svg>'
    )


def _outline(sound: Wave) -> str:
    """The highest and the lowest sample of each span of time, as points around the waveform."""
    import numpy as np

    if not len(sound.samples):
        return ""
    groups = np.array_split(sound.samples, min(_BINS, len(sound.samples)))
    loud = float(np.abs(sound.samples).max()) or 1.0
    step, middle = _BINS / len(groups), _HEIGHT / 2

    def point(number: int, level: float) -> str:
        return f"{number * step:.1f},{middle - level / loud * (middle - 16):.1f}"

    upper = [point(number, float(group.max()) + 0.01 * loud) for number, group in enumerate(groups)]
    lower = [point(number, float(group.min()) - 0.01 * loud) for number, group in enumerate(groups)]
    return " ".join(upper + lower[::-1])


def curves(found: Faithfulness) -> dict[str, str]:
    """Drawings of the two curves, each with the mean of random orders as a dashed line."""
    values = [one for one in (*found.deletion, *found.insertion) if math.isfinite(one)]
    values += [one for one in (found.random_deletion_area, found.random_insertion_area) if math.isfinite(one)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return {
        "Taken out, strongest first": _curve(found.deletion, found.random_deletion_area, low, high),
        "Put in, strongest first": _curve(found.insertion, found.random_insertion_area, low, high),
    }


def _curve(values: Sequence[float], chance: float, low: float, high: float) -> str:
    width, height, left, below = 300.0, 150.0, 48.0, 22.0
    gap = (high - low) or 1.0

    def y(value: float) -> float:
        return 8 + (high - value) / gap * (height - below - 16)

    def x(number: int) -> float:
        return left + number / max(len(values) - 1, 1) * (width - left - 10)

    points = [(x(number), y(value), value) for number, value in enumerate(values) if math.isfinite(value)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)
    dots = "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"><title>{value:.4g}</title></circle>' for a, b, value in points
    )
    mean = y(chance) if math.isfinite(chance) else y(low)
    told = ", ".join(f"{value:.3g}" for value in values) + f"; in random order {chance:.3g} on average"
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{told}">'
        f'<line class="axis" x1="{left}" x2="{width - 10}" y1="{y(low):.1f}" y2="{y(low):.1f}"/>'
        f'<line class="chance" x1="{left}" x2="{width - 10}" y1="{mean:.1f}" y2="{mean:.1f}"/>'
        f'<polyline points="{line}"/>{dots}'
        f'<text x="{left - 6}" y="{y(high) + 4:.1f}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{left - 6}" y="{y(low) + 4:.1f}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{left}" y="{height - 4}">0 %</text><text x="{width - 10}" y="{height - 4}" text-anchor="end">100 %'
        "</text></svg>"
    )
