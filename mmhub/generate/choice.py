"""Which token comes next: penalties, the filters of improbable tokens, and drawing one.

Letters in shapes: R rows that are being written, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmhub.generate.watermark import Mark
from mmhub.interfaces import Generation

_BLOCK = 64  # random numbers that are drawn at once for each row
_COLD = 1e-6  # a temperature below is 0 to fp32, and scores divided by that are no numbers


class Rules:
    """What changes the scores before a token is chosen: the repetition penalty, and that no text may end yet.

    `prompts` are the ids each row has read, which count as repeated; `ends` the ids that end a text. `limit` is the
    decoder's own word on which token may follow the ids written so far, (R, L): it gives scores (R, V) for scores.
    """

    def __init__(
        self,
        settings: Generation,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        limit: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self._settings, self._prompts, self._ends, self._limit = settings, prompts, list(ends), limit
        self._written: Tensor | None = None  # (R, L) long, kept only where there is a limit
        self._seen: Tensor | None = None  # (R, V) bool, kept only where there is a penalty

    def __call__(self, scores: Tensor, step: int) -> Tensor:
        """Return the scores (R, V) of the token number `step` (from 0); `scores` itself stays as it is."""
        if self._settings.repetition_penalty != 1:
            if self._seen is None:
                self._seen = _members(self._prompts, scores)
            penalty = self._settings.repetition_penalty
            scores = torch.where(self._seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if step < self._settings.min_new_tokens and self._ends:
            scores = scores.clone()
            scores[:, self._ends] = -torch.inf
        if self._limit is None:
            return scores
        if self._written is None:
            self._written = torch.zeros(len(scores), 0, dtype=torch.long, device=scores.device)
        return self._limit(scores, self._written)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        if self._seen is not None:
            self._seen = self._seen[rows]
        if self._written is not None:
            self._written = self._written[rows]

    def take(self, ids: Tensor) -> None:
        """Count the chosen ids, (R,), as seen."""
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        if self._written is not None:
            self._written = torch.cat((self._written, ids[:, None]), 1)


def _members(texts: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    seen = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    for row, ids in enumerate(texts):
        seen[row, [i for i in set(ids) if 0 <= i < like.shape[1]]] = True
    return seen


def filtered(scores: Tensor, settings: Generation) -> Tensor:
    """Divide scores (R, V) by the temperature and set those of tokens that may not be drawn to -inf.

    Temperature, top-k, top-p and min-p follow each other in this order, each on what the one before left, with the
    edge cases of transformers: tokens that tie with the k-th are kept, and one token always is.
    """
    scores = scores / max(settings.temperature, _COLD)
    if settings.top_k:
        weakest = scores.topk(min(settings.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < weakest, -torch.inf)
    if settings.top_p < 1:
        ascending, order = scores.sort(dim=1)
        tail = ascending.softmax(1).cumsum(1) <= 1 - settings.top_p
        tail[:, -1] = False
        scores = scores.masked_fill(tail.scatter(1, order, tail), -torch.inf)
    if settings.min_p > 0:
        chances = scores.softmax(1)
        scores = scores.masked_fill(chances < settings.min_p * chances.amax(1, keepdim=True), -torch.inf)
    return scores


class Draw:
    """Random choices of rows that never depend on each other: row and sample number seed a row's own numbers.

    They come from Python's generator, which gives the same numbers on every machine and device.
    """

    def __init__(
        self, settings: Generation, rows: Sequence[tuple[int, int]], device: torch.device, mark: Mark | None = None
    ) -> None:
        self._settings, self._device, self._mark = settings, device, mark
        self._sources = [random.Random(f"{settings.seed} {row} {sample}") for row, sample in rows]
        self._numbers = torch.zeros(0)
        self._used = _BLOCK

    def __call__(self, scores: Tensor) -> Tensor:
        """Draw one id of each row of scores (R, V), by the inverse of the cumulative distribution."""
        if self._used == _BLOCK:
            drawn = [[source.random() for _ in range(_BLOCK)] for source in self._sources]
            self._numbers, self._used = torch.tensor(drawn, device=self._device) * (1 - 1e-6), 0  # 1 is never drawn
        number = self._numbers[:, self._used : self._used + 1]
        self._used += 1
        kept = filtered(scores, self._settings)
        if self._mark is not None:
            kept = self._mark(kept)
        reached = kept.softmax(1).cumsum(1)
        ids = torch.searchsorted(reached, number * reached[:, -1:], right=True).squeeze(1)
        ids.clamp_(max=scores.shape[1] - 1)  # scores that are no numbers reach nothing
        if self._mark is not None:
            self._mark.take(ids)
        return ids

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self._sources = [self._sources[row] for row in rows]
        self._numbers = self._numbers[list(rows)]
        if self._mark is not None:
            self._mark.select(rows)
