"""An explanation on a terminal: texts under colours, grids and spark lines; or, without colours, numbers in tables."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from mmhub.explain.heat import (
    FAINT,
    about,
    colour,
    faith,
    full,
    place,
    signed,
    sources,
    spoken,
    strength,
    strongest,
    sums,
    title,
)
from mmhub.explain.records import Attribution, Explanation, Step
from mmhub.explain.sources import marked, raw_of

Colours = Literal["none", "256", "24-bit"]

_PLACES = 5  # pieces of a picture or a sound that are named
_ROWS = 50  # of a table of tokens
_STEPS = 40  # written tokens that are shown
_GRID = 32  # cells of a heat grid, at most, either way
_LEVELS = "▁▂▃▄▅▆▇█"
_REDS, _BLUES = (231, 224, 217, 210, 203), (231, 189, 153, 111, 69)  # of 256 colours, from none to full strength
_RESET = "\x1b[0m"


def render(explanation: Explanation, sample: Mapping[str, Any], *, width: int = 80, colours: Colours = "none") -> str:
    """Return an explanation as lines of a terminal that is `width` columns wide.

    Without colours it holds no control sequence and no drawing, but all that matters as numbers. Whatever users and
    models wrote is shown without control characters.
    """
    paint = _Painter(colours, max(width, 20))
    answer, score = spoken(explanation.answer)
    lines = [*paint.wrapped(clean(answer) + ("" if score is None else f"  {score:.4f}"))] if answer else []
    lines += paint.wrapped(f"{clean(explanation.target)!r} {about(explanation)}")
    if paint.on:
        lines.append(paint.legend())
    for attribution in explanation.attributions:
        lines += ["", *_item(attribution, raw_of(sample, attribution), explanation.attributions, paint)]
    lines += _shares(explanation.shares, paint)
    lines += _steps(explanation.steps, paint)
    lines += ["", *paint.wrapped(faith(explanation.faithfulness))] if explanation.faithfulness else []
    lines += paint.wrapped(sums(explanation))
    return "\n".join([*lines, *(line for text in explanation.notes for line in paint.wrapped(f"Note: {clean(text)}"))])


def clean(text: str) -> str:
    """Return a text in one line that cannot steer a terminal.

    >>> clean("a\\x1b[31m\\nb\\u202ec")
    'a\ufffd[31m b\ufffdc'
    """
    text = text.replace("\r\n", " ").replace("\n", " ").replace("\t", " ")
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def columns(text: str) -> int:
    """Return how many columns a text takes.

    >>> columns("ab"), columns("日本"), columns("e\\u0301")
    (2, 4, 1)
    """
    wide = sum(unicodedata.east_asian_width(one) in "WF" for one in text)
    return len(text) + wide - sum(unicodedata.combining(one) > 0 for one in text)


class _Painter:
    def __init__(self, colours: Colours, width: int) -> None:
        self.on, self.width = colours != "none", width
        self._deep = colours == "24-bit"

    def back(self, text: str, value: float) -> str:
        """A text on the colour of a strength, in black, which can be read on all of them."""
        if not self.on or abs(value) < FAINT:
            return text
        return f"\x1b[{self._code(48, value)};{self._ink}m{text}{_RESET}"

    def ink(self, text: str, value: float) -> str:
        """A text in the colour of a strength, at least half of it, so that it can be seen on any ground."""
        full = math.copysign(max(abs(value), 0.5), value)
        return f"\x1b[{self._code(38, full)}m{text}{_RESET}" if self.on and value else text

    def halves(self, upper: float, lower: float, times: int) -> str:
        """Two cells of a grid, one above the other, so many times side by side."""
        return f"\x1b[{self._code(38, upper)};{self._code(48, lower)}m{'▀' * times}"

    def legend(self) -> str:
        return "against " + "".join(self.back(" ", step / 6) or " " for step in range(-6, 7)) + " for"

    def wrapped(self, text: str) -> list[str]:
        """A text that was cleaned, in lines of the width."""
        return self.flow([(text, 0.0)])

    def flow(self, parts: Sequence[tuple[str, float]]) -> list[str]:
        """Parts with their strengths in lines of the width, broken between words."""
        lines: list[str] = []
        line, used = "", 0
        for word in _words(parts):
            size = sum(columns(text) for text, _ in word)
            if used and used + size > self.width:
                lines, line, used = [*lines, line.rstrip()], "", 0
                word = word if word[0][0] != " " else []
            for text, value in word:
                while columns(text) > self.width - used:
                    cut = max(_fitting(text, self.width - used), int(not used))
                    lines.append(line + self.back(text[:cut], value))
                    text, line, used = text[cut:], "", 0
                line, used = line + self.back(text, value), used + columns(text)
        return [*lines, line.rstrip()] if line.strip() else lines

    @property
    def _ink(self) -> str:
        return "38;2;0;0;0" if self._deep else "38;5;16"

    def _code(self, where: int, value: float) -> str:
        if self._deep:
            red, green, blue = colour(value)
            return f"{where};2;{red};{green};{blue}"
        step = max(round(abs(value) * 4), abs(value) >= FAINT)
        return f"{where};5;{(_REDS if value > 0 else _BLUES)[step]}"


def _words(parts: Sequence[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """Parts of texts grouped to words, each space a word of its own."""
    words: list[list[tuple[str, float]]] = [[]]
    for text, value in parts:
        pieces = text.split(" ")
        for number, piece in enumerate(pieces):
            if number:
                within = any(pieces[:number]) and any(pieces[number:])
                words += [[(" ", value if within else 0.0)], []]
            if piece:
                words[-1].append((piece, value))
    return [word for word in words if word]


def _fitting(text: str, room: int) -> int:
    """How many characters fit into so many columns."""
    used = 0
    for number, one in enumerate(text):
        used += columns(one)
        if used > room:
            return number
    return len(text)


def _item(attribution: Attribution, raw: Any, all_of: Sequence[Attribution], paint: _Painter) -> list[str]:
    name, scale = clean(title(attribution, all_of)), full(attribution, all_of)
    if attribution.kind == "token":
        return _text(name, attribution, raw, scale, paint)
    size = ""
    if attribution.kind == "patch" and len(attribution.size) == 2:
        size = f" ({attribution.size[0]:.0f} x {attribution.size[1]:.0f} pixels)"
    elif attribution.kind == "frame" and attribution.size:
        size = f" ({attribution.size[0]:.2f} s)"
    drawn: Callable[[Attribution, float, _Painter], list[str]] = _grid if attribution.kind == "patch" else _spark
    rows = [
        (paint.ink(signed(score := attribution.pieces[number].score).rjust(9), strength(score, scale)), number)
        for number in strongest(attribution, _PLACES)
    ]
    return [
        name + size,
        *(drawn(attribution, scale, paint) if paint.on else []),
        *(f"{score}  {place(attribution, number)}" for score, number in rows),
    ]


def _text(name: str, attribution: Attribution, raw: Any, scale: float, paint: _Painter) -> list[str]:
    if paint.on:
        marks = marked(attribution, raw)
        parts = [(clean(one.text), strength(one.piece.score, scale) if one.piece else 0.0) for one in marks]
        return [name, *paint.flow(parts)]
    order = strongest(attribution, _ROWS)
    left = len(attribution.pieces) - len(order)
    rows = [f"{signed(attribution.pieces[n].score):>9}  {n + 1:>5}  {clean(place(attribution, n))}" for n in order]
    said = [f"({left} more are weaker, or have no score)"] if left else []
    return [f"{name}: score, number and token", *rows, *said]


def _grid(attribution: Attribution, scale: float, paint: _Painter) -> list[str]:
    """Patches by half blocks, two rows of them in a line; of a fine grid the strongest patch of each cell."""
    if not attribution.grid or not all(attribution.grid):
        return []
    rows, across = attribution.grid
    if rows * across != len(attribution.pieces):
        return []
    values = [strength(piece.score, scale) for piece in attribution.pieces]
    high, wide = _cells(rows, across, min(_GRID, paint.width))

    def cell(row: int, column: int) -> float:
        if row >= high:
            return 0.0
        ys, xs = _span(row, high, rows), _span(column, wide, across)
        return max((values[y * across + x] for y in ys for x in xs), key=abs)

    lines = []
    for row in range(0, high, 2):
        pairs = groupby((cell(row, column), cell(row + 1, column)) for column in range(wide))
        lines.append("".join(paint.halves(*pair, times=len(list(same))) for pair, same in pairs) + _RESET)
    return lines


def _cells(rows: int, across: int, most: int) -> tuple[int, int]:
    """How many cells high and wide a grid is drawn: a small one larger, a large one smaller."""
    longer = max(rows, across)
    times = max(min(most // longer, 4), 1)
    if longer <= most:
        return rows * times, across * times
    return max(rows * most // longer, 1), max(across * most // longer, 1)


def _span(cell: int, cells: int, pieces: int) -> range:
    """The pieces that a cell of a row stands for."""
    first = cell * pieces // cells
    return range(first, max((cell + 1) * pieces // cells, first + 1))


def _spark(attribution: Attribution, scale: float, paint: _Painter) -> list[str]:
    """A bar for each span of time, as high as its strongest piece is strong."""
    end = max([*attribution.size[:1], *(piece.end for piece in attribution.pieces)], default=0.0)
    if end <= 0:
        return []
    count = min(paint.width, 72)
    values = [0.0] * count
    for piece in attribution.pieces:
        value = strength(piece.score, scale)
        first, last = int(piece.start / end * count), math.ceil(piece.end / end * count)
        for number in range(max(first, 0), min(last, count)):
            values[number] = max(values[number], value, key=abs)
    runs = [(value, len(list(same))) for value, same in groupby(values)]
    bars = "".join(paint.ink(_LEVELS[min(int(abs(value) * 8), 7)] * times, value) for value, times in runs)
    return [bars, "0 s" + f"{end:.2f} s".rjust(count - 3)]


def _shares(shares: Mapping[str, float], paint: _Painter) -> list[str]:
    if len(shares) < 2:
        return []
    total = math.fsum(abs(share) for share in shares.values() if math.isfinite(share))
    longest = max(columns(clean(name)) for name in shares)
    lines = ["", "Shares of the inputs"]
    for name, share in sorted(shares.items(), key=lambda entry: -abs(entry[1])):
        part = strength(share, total)
        name = clean(name) + " " * (longest - columns(clean(name)))
        room = max(min(paint.width - longest - 24, 40), 0)
        bar = paint.ink("█" * round(abs(part) * room), part) if paint.on else ""
        lines.append(f"{name} {signed(share):>9} {abs(part):>5.0%} {bar}".rstrip())
    return lines


def _steps(steps: Sequence[Step], paint: _Painter) -> list[str]:
    if not steps:
        return []
    names = [clean(step.text).strip() or repr(step.text) for step in steps[:_STEPS]]
    wide = min(max(map(columns, names)), 20)
    heading = "Written, token by token: log-probability, and what speaks most for or against it"
    lines = ["", *paint.wrapped(heading)]
    for name, step in zip(names, steps, strict=False):
        found = [f"{_source(kind, text)} {signed(score)}" for kind, text, score in sources(step.attributions, 3)]
        line = f"{name}{' ' * (wide - columns(name))}  {step.logprob:>7.2f}  {', '.join(found)}"
        lines += [
            line if not paint.on or columns(line) <= paint.width else line[: _fitting(line, paint.width - 1)] + "…"
        ]
    more = len(steps) - _STEPS
    return [*lines, f"({more} more tokens)"] if more > 0 else lines


def _source(kind: str, text: str) -> str:
    return repr(clean(text)) if kind.split()[0] in ("text", "written") else clean(f"{kind} {text}")
