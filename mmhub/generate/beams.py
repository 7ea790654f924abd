"""Beam search: the best hypotheses of each row side by side, token for token those of transformers' beam search.

Letters in shapes: B rows, K beams, C candidates (more than K: K are left when some end), L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmhub.generate.choice import Rules
from mmhub.interfaces import Generation

_NEVER = -1.0e9  # the score of what may not be chosen; as finite as transformers' own
Found = tuple[list[int], float]  # ids, and the sum of their log-probabilities


def search(
    source: Any,
    logits: Tensor,
    state: Any,
    settings: Generation,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    ends: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    limit: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[list[Found]]:
    """Return up to K finished hypotheses for each row, best first, from the logits (B, V) of their first token.

    A hypothesis is worth its log-probability / length ** `length_penalty`. A row is done when no running hypothesis
    could become better than the worst finished one at its present length, or, with `early_stopping`, when K have
    finished; rows never depend on each other. `limit` is as in `Rules`.
    """
    k, device = settings.beams, logits.device
    repeated = torch.arange(len(rooms), device=device).repeat_interleave(k)
    logits, state = logits[repeated], source.select(state, repeated)
    rules = Rules(settings, [ids for ids in prompts for _ in range(k)], ends, limit)
    beams = _Beams(settings, rooms, ends, decode, device)
    step = 0
    while True:
        order, ids = beams.advance(logits, rules, step)
        step += 1
        if not len(order):
            return beams.results
        logits, state = source.step(ids, source.select(state, order))


class _Beams:
    """The running and the finished hypotheses of the rows that are not done."""

    def __init__(
        self,
        settings: Generation,
        rooms: Sequence[int],
        ends: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        device: torch.device,
    ) -> None:
        rows, k = len(rooms), settings.beams
        self.results: list[list[Found]] = [[] for _ in rooms]
        self._settings, self._decode = settings, decode
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self._candidates = max(2, 1 + len(ends)) * k
        self._rows = list(range(rows))
        self._room = torch.tensor([min(room, 2**31) for room in rooms], device=device)
        self._running = torch.zeros(rows, k, 0, dtype=torch.long, device=device)
        self._worth = torch.zeros(rows, k, device=device)  # of the running ones, with penalties
        self._worth[:, 1:] = _NEVER  # all beams are the same at first: only one may be gone on with
        self._sums = torch.zeros(rows, k, device=device)  # log-probabilities without penalties
        self._done = torch.zeros(rows, k, 0, dtype=torch.long, device=device)
        self._done_worth = torch.full((rows, k), _NEVER, device=device)
        self._done_sums = torch.zeros(rows, k, device=device)
        self._lengths = torch.zeros(rows, k, dtype=torch.long, device=device)
        self._is_done = torch.zeros(rows, k, dtype=torch.bool, device=device)

    def advance(self, logits: Tensor, rules: Rules, step: int) -> tuple[Tensor, Tensor]:
        """Add a token to every beam, from logits (B * K, V).

        Return which of the B * K beams to go on with, (B' * K,), for the B' rows that are not done, and their new ids.
        """
        k, rows = self._settings.beams, len(self._rows)
        plain = logits.float().log_softmax(1)
        vocabulary = plain.shape[1]
        worth = (rules(plain, step).view(rows, k, vocabulary) + self._worth[..., None]).view(rows, -1)
        worth, flat = worth.topk(min(self._candidates, worth.shape[1]))  # (B, C)
        beam, ids = flat // vocabulary, flat % vocabulary
        sums = self._sums.gather(1, beam) + plain.view(rows, -1).gather(1, flat)
        texts = torch.cat([_gather(self._running, beam), ids[..., None]], 2)  # (B, C, step + 1)
        ended = torch.isin(ids, self._ends) | (self._room <= step + 1)[:, None]
        if self._settings.stop:
            ended |= self._holds_stop(texts)
        best = (worth + ended.float() * _NEVER).topk(k).indices  # the beams to go on with, (B, K)
        self._finish(texts, worth, sums, ended, step + 1)
        self._running, self._sums = _gather(texts, best), sums.gather(1, best)
        self._worth = (worth + ended.float() * _NEVER).gather(1, best)
        beam = beam.gather(1, best)
        chosen = self._running[:, :, -1]
        keep = self._leave(ended, step + 1)
        order = (keep[:, None] * k + beam[keep]).flatten()
        rules.select(order)
        rules.take(chosen[keep].flatten())
        return order, chosen[keep].flatten()

    def _finish(self, texts: Tensor, worth: Tensor, sums: Tensor, ended: Tensor, length: int) -> None:
        """Let those of the K best candidates that ended take the places of worse finished ones."""
        k = self._settings.beams
        new = ended.clone()
        new[:, k:] = False  # the others are there to go on with only
        worth = worth / length**self._settings.length_penalty + (~new) * _NEVER
        longer = torch.nn.functional.pad(self._done, (0, 1))
        everything = torch.cat([self._done_worth, worth], 1)
        self._done_worth, best = everything.topk(k)
        self._done = _gather(torch.cat([longer, texts], 1), best)
        self._done_sums = torch.cat([self._done_sums, sums], 1).gather(1, best)
        lengths = torch.full(worth.shape, length, dtype=torch.long, device=worth.device)
        self._lengths = torch.cat([self._lengths, lengths], 1).gather(1, best)
        self._is_done = torch.cat([self._is_done, new], 1).gather(1, best)

    def _leave(self, ended: Tensor, length: int) -> Tensor:
        """Keep the results of rows that are done and go on with the others; return their places, (B',)."""
        hoped = self._worth[:, :1] / length**self._settings.length_penalty
        worst = self._done_worth.amin(1, keepdim=True).where(self._is_done, torch.tensor(_NEVER, device=hoped.device))
        done = ~(hoped > worst).any(1) | ended.all(1)
        if self._settings.early_stopping:
            done |= self._is_done.all(1)
        if not bool(done.any()):
            return torch.arange(len(self._rows), device=done.device)
        for place in done.nonzero().flatten().tolist():
            self.results[self._rows[place]] = self._best(place)
        keep = (~done).nonzero().flatten()
        self._rows = [self._rows[place] for place in keep.tolist()]
        for name in (
            "_room",
            "_running",
            "_worth",
            "_sums",
            "_done",
            "_done_worth",
            "_done_sums",
            "_lengths",
            "_is_done",
        ):
            setattr(self, name, getattr(self, name)[keep])
        return keep

    def _best(self, place: int) -> list[Found]:
        table = (self._done, self._lengths, self._done_sums, self._is_done)
        rows = zip(*(part[place].tolist() for part in table), strict=True)
        return [(ids[:length], total) for ids, length, total, is_done in rows if is_done]

    def _holds_stop(self, texts: Tensor) -> Tensor:
        found = [
            [any(stop in self._decode(ids) for stop in self._settings.stop) for ids in row] for row in texts.tolist()
        ]
        return torch.tensor(found, device=texts.device)


def _gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Select along dimension 1: (B, K, L), (B, C) -> (B, C, L)."""
    return tensor.gather(1, index[..., None].expand(*index.shape, tensor.shape[2]))
