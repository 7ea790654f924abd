"""Searches of a retrieval model: for some rows the five things it finds first, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Any

import torch
from torch import Tensor

from mmhub.evaluation import Answered
from mmhub.report.media import Shelf, Shown

SHOWN, WORST, FOUND = 5, 5, 5  # queries spread over the rows, those with the worst ranks, and what is shown of each
TIE = 1e-6  # cosines that differ by less are equal, as for the metric
_BLOCK = 512  # queries compared at a time


@dataclass(frozen=True)
class Found:
    """A thing that was found: its inputs, similarity, and whether it belongs to the query."""

    row: int
    score: float
    right: bool
    inputs: Sequence[Shown]


@dataclass(frozen=True)
class Search:
    """A query, the rank of its nearest right thing (from 1), the first things, and the right one if not in them."""

    row: int
    where: str
    rank: int
    inputs: Sequence[Shown]
    found: Sequence[Found]
    missed: Found | None


@dataclass(frozen=True)
class Direction:
    """Searches from one side to the other, `examples` spread evenly over the rows and the `worst`, among `things`."""

    query: str
    target: str
    things: int
    examples: Sequence[Search]
    worst: Sequence[Search]

    def facts(self) -> dict[str, Any]:
        """Return what report.json says."""

        def line(search: Search) -> dict[str, Any]:
            found = [{"row": one.row, "score": one.score, "right": one.right} for one in search.found]
            return {"row": search.row, "where": search.where, "rank": search.rank, "found": found}

        named = {"query": self.query, "target": self.target, "things": self.things}
        return named | {"examples": list(map(line, self.examples)), "worst": list(map(line, self.worst))}


def find_searches(answered: Answered, shelf: Shelf) -> list[Direction]:
    """Search with every row that has a pair, from either side to the other, among all rows, as the metrics do."""
    sides = list(dict.fromkeys(side for _, p, _ in answered.answers for side in p["embeddings"]))
    return [_direct(answered, shelf, *pair) for pair in (sides, sides[::-1])] if len(sides) == 2 else []


_Item = tuple[int, Sequence[float], str]  # row, vector, and the group it belongs to


def _items(answered: Answered, side: str) -> list[_Item]:
    named = [(row, p["embeddings"], f"row {row}" if r is None else f"group {r!r}") for row, p, r in answered.answers]
    return [(row, vectors[side], group) for row, vectors, group in named if side in vectors]


def _direct(answered: Answered, shelf: Shelf, query: str, target: str) -> Direction:
    things = _items(answered, target)
    groups = {group for *_, group in things}
    asked = [item for item in _items(answered, query) if item[2] in groups]
    if not asked:
        return Direction(query, target, len(things), [], [])
    ranks, best, right = _rank(asked, things)
    spread = sorted({i * len(asked) // SHOWN for i in range(SHOWN)})
    worst = [i for i in nlargest(WORST, range(len(asked)), key=lambda i: (ranks[i], -i)) if ranks[i] > 1]

    def thing(i: int, score: float, j: int) -> Found:
        row, _, group = things[j]
        return Found(row, score, group == asked[i][2], shelf.input_of(row, target))

    def search(i: int) -> Search:
        row = asked[i][0]
        found = [thing(i, *pair) for pair in best[i]]
        missed = None if any(one.right for one in found) else thing(i, *right[i])
        return Search(row, shelf.where(row), ranks[i], shelf.input_of(row, query), found, missed)

    return Direction(query, target, len(things), [search(i) for i in spread], [search(i) for i in worst])


_Scored = tuple[float, int]  # a similarity and the number of a thing


def _rank(asked: Sequence[_Item], things: Sequence[_Item]) -> tuple[list[int], list[list[_Scored]], list[_Scored]]:
    """Of each query the rank of its nearest right thing, the first few things, and that right one.

    Ties count against the model, as in the metric.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(group for *_, group in things))}
    groups = torch.tensor([numbers[group] for *_, group in things])
    matrix = torch.tensor([vector for _, vector, _ in things])
    ranks: list[int] = []
    best: list[list[_Scored]] = []
    right: list[_Scored] = []
    for start in range(0, len(asked), _BLOCK):
        part = asked[start : start + _BLOCK]
        scores = torch.tensor([vector for _, vector, _ in part]) @ matrix.T
        own = torch.tensor([numbers[group] for *_, group in part])[:, None] == groups
        highest, place = scores.masked_fill(~own, -torch.inf).max(1)
        ranks += (~(scores < highest[:, None] - TIE) & ~own).sum(1).add(1).tolist()
        right += _pairs(highest, place)
        best += [_pairs(*row) for row in zip(*scores.topk(min(FOUND, len(things))), strict=True)]
    return ranks, best, right


def _pairs(scores: Tensor, places: Tensor) -> list[_Scored]:
    return list(zip(scores.tolist(), places.tolist(), strict=True))
