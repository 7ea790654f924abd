"""Which rows make a batch: at random, but rows of like length together, or up to a number of padded tokens.

The plan of an epoch is a pure function of lengths, seed and epoch: every process computes the same one, and so does a
resumed run. An epoch is shuffled and cut into pools of `POOL` batches; rows are sorted by length only inside a pool and
cut into batches, and these are shuffled over the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmhub.data.lengths import Lengths
from mmhub.data.loader import batches_of, epoch_order, row_seed

POOL = 64  # batches that are sorted together


def plan_epoch(
    rows: int | Sequence[int],
    *,
    lengths: Lengths | None = None,
    batch_size: int = 0,
    batch_tokens: int = 0,
    group_by_length: bool = True,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Return the batches of an epoch, each a list of row numbers; every row is in one of them.

    `rows` is their number, or those to use out of the ones that `lengths` knows. A batch has at most `batch_size` rows
    and `batch_tokens` padded tokens (rows times the longest, in all modalities), 0 for no limit; one row that has more
    is a batch of its own. Without different lengths or `group_by_length`, it is the shuffled order cut into pieces.
    """
    known = range(rows) if isinstance(rows, int) else rows
    order = np.asarray(known, np.int64)[epoch_order(len(known), seed, epoch)]
    return _plan(order, lengths, batch_size, batch_tokens, group_by_length, row_seed(seed, epoch))


def plan_window(
    rows: int,
    *,
    lengths: Lengths | None = None,
    batch_size: int = 0,
    batch_tokens: int = 0,
    group_by_length: bool = True,
    seed: int,
) -> list[list[int]]:
    """Cut `rows` neighbours of a stream, already shuffled, as `plan_epoch` cuts an epoch: lists of their positions."""
    return _plan(np.arange(rows), lengths, batch_size, batch_tokens, group_by_length, seed)


def plan_in_order(rows: int, lengths: Lengths | None, *, batch_size: int = 0, batch_tokens: int = 0) -> list[list[int]]:
    """Cut rows into batches from the longest to the shortest, for work in which order and chance do not matter."""
    order = np.arange(rows)
    if lengths is not None and lengths.varying:
        order = _by_length(order, lengths)[::-1]
    return _cut(order, lengths, batch_size, batch_tokens)


def _plan(
    order: NDArray[np.int64], lengths: Lengths | None, size: int, tokens: int, grouped: bool, seed: int
) -> list[list[int]]:
    if lengths is None or not grouped or not lengths.varying:
        return _cut(order, lengths, size, tokens)
    pool = POOL * _usual_rows(order, lengths, size, tokens)
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        batches += _cut(_by_length(order[start : start + pool], lengths), lengths, size, tokens)
    draw = torch.Generator().manual_seed(row_seed(seed, 1))
    return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


def _usual_rows(order: NDArray[np.int64], lengths: Lengths, size: int, tokens: int) -> int:
    """How many rows a batch has, about."""
    if not tokens:
        return size or len(order)
    each = sum(float(found[order].mean()) for found in lengths.tokens.values())
    fitting = max(1, int(tokens / max(each, 1.0)))
    return min(size, fitting) if size else fitting


def _by_length(order: NDArray[np.int64], lengths: Lengths) -> NDArray[np.int64]:
    """Sort rows by raw positions, which leaves equal lengths together, the costliest modality first; ties stay."""
    keys = [lengths.positions[name][order] for name in reversed(lengths.varying)]
    return order[np.lexsort(keys)]


def _cut(order: NDArray[np.int64], lengths: Lengths | None, size: int, tokens: int) -> list[list[int]]:
    """Cut an order into batches of at most `size` rows and `tokens` padded tokens."""
    size = size or max(1, len(order))
    if not tokens or lengths is None or not lengths.tokens:
        return batches_of(order.tolist(), size)
    batches: list[list[int]] = [[]] if len(order) else []
    costs = np.stack([found[order] for found in lengths.tokens.values()], 1).tolist()
    longest = [0] * len(lengths.tokens)
    for row, cost in zip(order.tolist(), costs, strict=True):
        longest = list(map(max, longest, cost))
        full = len(batches[-1]) == size or (len(batches[-1]) + 1) * sum(longest) > tokens
        if full and batches[-1]:
            batches.append([])
            longest = cost
        batches[-1].append(row)
    return batches
