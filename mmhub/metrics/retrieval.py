"""Metrics of search: how far down the list the right thing stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST = (1, 5, 10)  # the k of recall at k
_CHUNK = 2**24  # scores held at once: 64 MiB
_TIE = 1e-6  # cosines that differ by less are equal, as far as single precision can tell


def retrieval(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    """Return recall at 1, 5 and 10, the median rank, and the mean of all recalls, each way between two sides.

    `predictions` are {"embeddings": {side: vector of length 1}}, `references` the group of each row: rows of one group
    belong together. An item of one side asks for those of the other, of which the nearest of its own group counts; its
    rank is the number of items that are at least as near, itself included, so that ties count against the model. Items
    of whose group the other side has none ask nothing, but stand among what is searched. Recalls are shares, 0 to 1.

    Values: {"recall": {"text_to_image": {"1", "5", "10"}, ...}, "median_rank": {"text_to_image", ...}, "mean_recall"};
    nothing where no item has a partner.
    """
    groups = _numbered(references)
    sides = {side: _side(predictions, groups, side) for side in _names(predictions)}
    ranks = {f"{one}_to_{other}": _ranks(*sides[one], *sides[other]) for one, other in permutations(sides, 2)}
    ranks = {name: found for name, found in ranks.items() if len(found)}
    if not ranks:
        return {}
    recall = {name: {str(k): float((found <= k).mean()) for k in FIRST} for name, found in ranks.items()}
    return {
        "recall": recall,
        "median_rank": {name: float(np.median(found)) for name, found in ranks.items()},
        "mean_recall": float(np.mean([share for shares in recall.values() for share in shares.values()])),
    }


def _names(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sides in the model's order, as a row with both has them."""
    return max((list(one["embeddings"]) for one in predictions), key=len)


def _numbered(references: Sequence[Any]) -> NDArray[np.int64]:
    """A number for each group, (N,); a row without one is a group of its own."""
    names = [f"row {row}" if group is None else f"group {group!r}" for row, group in enumerate(references)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)


Side = tuple[NDArray[np.float32], NDArray[np.int64]]  # vectors (M, E) of the rows that have this side, and their groups


def _side(predictions: Sequence[Mapping[str, Any]], groups: NDArray[np.int64], side: str) -> Side:
    rows = [row for row, one in enumerate(predictions) if side in one["embeddings"]]
    vectors = [predictions[row]["embeddings"][side] for row in rows]
    return np.asarray(vectors, np.float32).reshape(len(rows), -1), groups[rows]


def _ranks(
    queries: NDArray[np.float32], asked: NDArray[np.int64], items: NDArray[np.float32], groups: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The rank of the nearest item of its group for each query that has one there, (Q,), 1 for the first."""
    known = np.isin(asked, groups)
    queries, asked = queries[known], asked[known]
    step = max(1, _CHUNK // max(1, len(items)))
    parts = [
        _ranks_of(queries[start : start + step] @ items.T, asked[start : start + step, None] == groups)
        for start in range(0, len(queries), step)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _ranks_of(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Ranks by scores (Q, M); what is not a number comes last."""
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    ahead = ~(scores < best - _TIE) & ~right
    ranks: NDArray[np.int64] = ahead.sum(1) + 1
    return ranks
