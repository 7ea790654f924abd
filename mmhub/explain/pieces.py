"""Cut the items of a sample into pieces that a person can look at, and take pieces out.

Every piece that can be taken out has a number; a surface knows which number each of its positions belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmhub.explain.places import Spot, spans_of, token_texts
from mmhub.explain.probe import Probe
from mmhub.explain.records import Attribution, Kind, Piece
from mmhub.explain.surfaces import WRITTEN, Surface

_LOUDEST = 1e4  # 80 dB above nothing
SHORTEST = 0.02  # seconds of a frame
FIXED = -1  # the number of what stays: special tokens, a chat template, padding
Cut = Callable[[str, int], tuple[int, ...] | None]  # modality, item -> a grid or number of pieces, None for the usual


@dataclass(frozen=True)
class Group:
    """The pieces of one item, their numbers (FIXED for what cannot be taken out), and which belong together.

    `windows` are what occlusion covers at a time: neighbours, so that what lies across a border is found.
    """

    modality: str
    item: int
    kind: Kind
    pieces: tuple[Piece, ...]
    numbers: tuple[int, ...]
    windows: tuple[tuple[int, ...], ...]
    grid: tuple[int, int] | None = None
    size: tuple[float, ...] = ()

    def attribution(self, scores: Tensor, end: int | None = None) -> Attribution:
        """Return the pieces, up to `end`, with their scores (P,)."""
        known = [0.0 if number == FIXED else float(scores[number]) for number in self.numbers]
        pieces = tuple(replace(piece, score=score) for piece, score in zip(self.pieces, known, strict=True))[:end]
        return Attribution(
            modality=self.modality, kind=self.kind, pieces=pieces, item=self.item, grid=self.grid, size=self.size
        )


@dataclass(frozen=True)
class Pieces:
    """All groups of a sample, and for each surface the number of each position, which broadcasts over its numbers."""

    groups: tuple[Group, ...]
    numbers: tuple[Tensor, ...]  # (N, ...) long
    total: int

    @property
    def prompt(self) -> list[int]:
        """The numbers of pieces that were given, not written."""
        return [n for group in self.groups if group.modality != WRITTEN for n in group.numbers if n != FIXED]

    def without(self, surfaces: Sequence[Surface], keep: Tensor, *, fading: bool = False) -> tuple[Tensor, ...]:
        """Return the surfaces of R rows of which pieces are kept, (R, P) from 0 to 1: (R, N, ...) each.

        With `fading` samples of sound grow in equal steps of loudness.
        """
        padded = torch.cat([keep, keep.new_ones(len(keep), 1)], 1)
        found = []
        for surface, numbers in zip(surfaces, self.numbers, strict=True):
            part = padded[:, numbers]
            if fading and surface.x.ndim == 2:
                steps = _loudness(surface)
                part = torch.expm1(part * steps) / math.expm1(steps)
            found.append(surface.origin + (surface.x - surface.origin) * part)
        return tuple(found)


def _loudness(surface: Surface) -> float:
    """By how much a sound is louder than nothing, as a logarithm."""
    quiet = float(surface.origin.square().mean().sqrt())
    ratio = float(surface.x.square().mean().sqrt()) / max(quiet, 1e-12)
    return math.log(min(max(ratio, 1.1), _LOUDEST))


def cut(probe: Probe, spots: dict[str, list[Spot]], most: int, how: Cut | None = None) -> Pieces:
    """Cut every item into at most `most` pieces, or the grid that `how` gives."""
    groups: list[Group] = []
    numbers: list[Tensor] = []
    start = 0
    for surface in probe.surfaces:
        whole = torch.full(_shape(surface), FIXED, device=surface.x.device)
        if surface.ids is not None:
            made = _tokens(probe, surface, spots.get(surface.name, []), whole, start, most)
        else:
            made = []
            for item, spot in enumerate(spots[surface.name]):
                made.append(_cut_item(surface, item, spot, whole, start + sum(map(_count, made)), most, how))
        start += sum(map(_count, made))
        groups += made
        numbers.append(whole)
    return Pieces(tuple(groups), tuple(numbers), start)


def _count(group: Group) -> int:
    return sum(number != FIXED for number in group.numbers)


def _shape(surface: Surface) -> tuple[int, ...]:
    """The shape of a surface's numbers of pieces: 1 where it does not matter which one it is."""
    shape = surface.x.shape
    if surface.ids is not None:
        return (*shape[:2], 1)
    if surface.mask.shape[1] == 1 and len(shape) == 4:
        return (shape[0], 1, *shape[2:])
    if len(shape) == 2:
        return tuple(shape)
    time = 2 if surface.mask.shape[1] == shape[2] else 1
    return tuple(size if axis in (0, time) else 1 for axis, size in enumerate(shape))


def _cut_item(surface: Surface, item: int, spot: Spot, whole: Tensor, start: int, most: int, how: Cut | None) -> Group:
    wish = how(surface.name, item) if how else None
    if whole.ndim == 4:
        return _patches(surface, item, spot, whole, start, wish or _grid(whole.shape[2], whole.shape[3], most))
    longest = math.ceil(int(surface.mask[item].sum()) * spot.seconds / SHORTEST)
    return _frames(surface, item, spot, whole, start, wish[0] if wish else max(1, min(most, longest)))


def _grid(height: int, width: int, most: int) -> tuple[int, int]:
    side = max(1, math.isqrt(most))
    return min(side, height), min(side, width)


def _patches(surface: Surface, item: int, spot: Spot, whole: Tensor, start: int, grid: tuple[int, ...]) -> Group:
    rows, columns = grid
    height, width = whole.shape[2:]
    y = torch.arange(height, device=whole.device) * rows // height
    x = torch.arange(width, device=whole.device) * columns // width
    whole[item, 0] = start + y[:, None] * columns + x
    pieces = []
    for row in range(rows):
        for column in range(columns):
            top, bottom = (-(-edge * height // rows) for edge in (row, row + 1))
            left, right = (-(-edge * width // columns) for edge in (column, column + 1))
            pieces.append(Piece(score=0.0, box=spot.box(left, top, right, bottom)))
    inside = [
        tuple(
            start + r * columns + c
            for r in (row - 1, row)
            for c in (column - 1, column)
            if 0 <= r < rows and 0 <= c < columns
        )
        for row in range(rows + 1)
        for column in range(columns + 1)
    ]
    numbers = tuple(range(start, start + rows * columns))
    return Group(
        surface.name,
        item,
        "patch",
        tuple(pieces),
        numbers,
        tuple(inside),
        (rows, columns),
        tuple(map(float, spot.size)),
    )


def _frames(surface: Surface, item: int, spot: Spot, whole: Tensor, start: int, most: int) -> Group:
    length = int(surface.mask[item].sum())
    count = max(1, min(most, length))
    own = torch.arange(length, device=whole.device) * count // max(length, 1) + start
    whole[item].reshape(-1)[:length] = own  # a view: all sizes but that of time are 1
    edges = [-(-number * length // count) * spot.seconds for number in range(count + 1)]
    pieces = tuple(Piece(score=0.0, start=a, end=b) for a, b in pairwise(edges))
    windows = tuple(
        tuple(start + number for number in (place - 1, place) if 0 <= number < count) for place in range(count + 1)
    )
    return Group(surface.name, item, "frame", pieces, tuple(range(start, start + count)), windows, None, (edges[-1],))


def _tokens(probe: Probe, surface: Surface, spots: list[Spot], whole: Tensor, start: int, most: int) -> list[Group]:
    """The tokens of each text, and behind a prompt those that were written."""
    assert surface.ids is not None
    if surface.name == WRITTEN:
        places = surface.mask[0].nonzero().squeeze(1).tolist()
        return [_written(probe, whole, places, start)]
    groups, behind = [], len(probe.question.ids) if probe.model.decoder.reads_text else 0
    processor: Any = probe.model.processors[surface.name]
    for item in range(len(surface.ids)):
        length = int(surface.mask[item].sum()) - behind
        ids = surface.ids[item, :length].tolist()
        texts, spans = token_texts(processor, ids), spans_of(processor, ids, spots[item].texts)
        numbers = []
        for place, span in enumerate(spans):
            numbers.append(FIXED if span is None else start)
            if span is not None:
                whole[item, place, 0] = start
                start += 1
        pieces = tuple(
            Piece(
                score=0.0,
                text=text if span is None else span[2],
                start=span[0] if span else 0,
                end=span[1] if span else 0,
            )
            for text, span in zip(texts, spans, strict=True)
        )
        own = [number for number in numbers if number != FIXED]
        size = max(1, -(-len(own) // most))
        windows = tuple(tuple(own[at : at + size]) for at in range(0, len(own), size))
        groups.append(Group(surface.name, item, "token", pieces, tuple(numbers), windows))
        if behind:
            groups.append(_written(probe, whole, list(range(length, length + behind - 1)), start))
    return groups


def _written(probe: Probe, whole: Tensor, places: list[int], start: int) -> Group:
    numbers = tuple(range(start, start + len(places)))
    for place, number in zip(places, numbers, strict=True):
        whole[0, place, 0] = number
    pieces = tuple(Piece(score=0.0, text=text) for text in probe.question.written[: len(places)])
    return Group(WRITTEN, 0, "token", pieces, numbers, tuple((number,) for number in numbers))
