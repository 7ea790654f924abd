"""Where words begin and end, told by the silence between them.

A CTC model says which words were said and about where: it was trained without times, and its tokens are tens of
milliseconds long. Where there is a pause beside a word, its edge is heard in the sound itself.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

STEP = 0.01  # seconds over which loudness is measured
_LEAST = 3  # steps that silence lasts at least
_RANGE = 15.0  # dB between loud and quiet parts, without which there is no silence
_BELOW = 32.0  # dB below the loud parts at which silence begins, at most
PAD = 0.04  # seconds of silence that are left to a word at either end, for sounds fade
_REACH = 0.3  # seconds from where the model puts an edge to where it may be moved


def loudness(samples: Tensor, rate: int) -> Tensor:
    """Return the power of samples (S,) in dB in each 10 ms, (F,), at any rate in Hz; the last step may be shorter."""
    edges = (torch.arange(math.ceil(len(samples) / (rate * STEP)) + 1) * (rate * STEP)).round().long()
    edges = edges.clamp(max=len(samples))
    total = torch.cat((torch.zeros(1, dtype=torch.float64), samples.double().square().cumsum(0)))
    power = total[edges].diff() / edges.diff().clamp(min=1)
    return (10 * (power.clamp(min=0) + 1e-10).log10()).float()


def settle(words: Sequence[Mapping[str, Any]], loud: Tensor) -> list[dict[str, Any]]:
    """Return words, {"word", "start", "end"} in seconds, that begin and end where the silence beside them does.

    A little of the silence is left to each. Between the middles of two words that of all silences counts that is long
    and near to where the model puts their edges; without any, edges stay. `loud` is the `loudness` of the recording,
    (F,).
    """
    found = [dict(word) for word in words]
    quiet = silences(loud)
    starts, ends = [start for start, _ in quiet], [end for _, end in quiet]
    middles = [(word["start"] + word["end"]) / 2 for word in found]
    for place in range(len(found) + 1):
        before = found[place - 1] if place else None
        after = found[place] if place < len(found) else None
        low = middles[place - 1] if before else 0.0
        high = middles[place] if after else len(loud) * STEP
        edges = ([before["end"]] if before else []) + ([after["start"]] if after else [])
        between = quiet[bisect_right(ends, low) : bisect_left(starts, high)]
        best = _nearest(between, low, high, sum(edges) / len(edges)) if edges else None
        if best is None:
            continue
        pad = min(PAD, (best[1] - best[0]) / 3)
        if before:
            before["end"] = round(best[0] + pad, 3)
        if after:
            after["start"] = round(best[1] - pad, 3)
    return found


def silences(loud: Tensor) -> list[tuple[float, float]]:
    """Return the stretches of silence, start and end in seconds, in a recording of this loudness (F,)."""
    if len(loud) < 2 * _LEAST:
        return []
    low, high = torch.quantile(loud, torch.tensor([0.05, 0.95])).tolist()
    if high - low < _RANGE:
        return []
    quiet = (loud < high - min(0.7 * (high - low), _BELOW)).tolist()
    found, start = [], 0
    for place, silent in enumerate([*quiet, False]):
        if silent:
            continue
        if place - start >= _LEAST:
            found.append((start * STEP, place * STEP))
        start = place + 1
    return found


def _nearest(quiet: Sequence[tuple[float, float]], low: float, high: float, about: float) -> tuple[float, float] | None:
    """The silence between two times that is long, and near to where it is looked for."""
    best, most = None, -1.0
    for start, end in quiet:
        start, end = max(start, low), min(end, high)
        away = max(start - about, about - end, 0.0)
        if end <= start or away > _REACH:
            continue
        worth = min(end - start, 0.2) - away / 2
        if worth > most:
            best, most = (start, end), worth
    return best
