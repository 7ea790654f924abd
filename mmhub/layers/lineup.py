"""Text and media in one stream: each row's tokens of text, and those of its items where they stand in it.

No token holds an item's place, so nothing can be miscounted. Where everything goes is computed on the device, and the
device is waited for once: for the lengths of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Features, Plan


def line_up(text: Features, media: Mapping[str, Features], plan: Plan | None = None, *, pack: bool = False) -> Features:
    """Put items (N, t, D), with their `rows`, between the tokens of text (B, T, D), as the plan says: (B, W, D).

    Without a plan, the items of a row stand before its text, those of one modality behind those of another; without
    `rows`, each row has one item. An item whose mask is empty takes no position. Where a row holds several texts, an
    item belongs to the one that goes on behind it. `ids` are -1 where there is no text; `loss` is kept, or else says
    what a language model would predict of the text alone. Without any item the text is returned as it is.

    `pack` puts rows that together are no longer than the longest one behind each other, first-fit decreasing, with
    `parts` to tell them apart, where fewer rows come of it: for a training loss, which is a mean over all tokens.
    """
    media = {name: features for name, features in media.items() if len(features.tokens)}
    if not media:
        return text
    seats = _Seats.of(text, media, plan)
    lengths = seats.lengths.tolist()  # the one wait for the device
    width = max([*lengths, 1])
    firsts = _packed(lengths, width) if pack and text.parts is None and text.continues is None else None
    canvas = _Canvas(text, width, firsts)
    here = torch.where(text.mask, canvas.firsts[:, None] + seats.text, canvas.nowhere)
    masks = [features.mask for features in media.values()]
    there = [
        torch.where(
            mask & (rows >= 0)[:, None],
            (canvas.firsts[rows] + start)[:, None] + torch.arange(mask.shape[1], device=mask.device),
            canvas.nowhere,
        )
        for mask, rows, start in zip(masks, seats.rows, seats.starts, strict=True)
    ]
    dtype = text.tokens.dtype
    tokens = [text.tokens.flatten(0, 1), *(features.tokens.flatten(0, 1).to(dtype) for features in media.values())]
    where = [here.flatten(), *(place.flatten() for place in there)]
    return Features(
        canvas.gathered(tokens, torch.cat(where)),
        canvas.mask(seats.lengths),
        ids=None if text.ids is None else canvas.filled(text.ids.flatten(), where[0], -1),
        loss=None if (loss := _loss(text)) is None else canvas.filled(loss.flatten(), where[0], 0),
        parts=canvas.parts(seats.lengths, text, where[0]),
        continues=text.continues,
    )


@dataclass(frozen=True)
class _Seats:
    """Where things stand in their own rows."""

    lengths: Tensor  # (B,) long, tokens of each row, those of its items included
    text: Tensor  # (B, T) long, the position of each token of text
    rows: list[Tensor]  # (N,) long for each modality, the row of each item, -1 for one that stands in none
    starts: list[Tensor]  # (N,) long for each modality, the position of each item's first token

    @classmethod
    def of(cls, text: Features, media: Mapping[str, Features], plan: Plan | None) -> _Seats:
        count, width = text.mask.shape
        device = text.mask.device
        owners = [_owners(features) for features in media.values()]
        places = _in_front(owners, count) if plan is None else _planned(owners, list(media), plan)
        sizes = [len(own) for own in owners]
        place = torch.cat(places)
        rows = torch.cat(owners).masked_fill(place < 0, count)  # what stands in no row stands behind them all
        order = ((rows << 32) + place.clamp(min=0)).argsort()
        row, tokens = rows[order], torch.cat([features.lengths for features in media.values()])[order]
        first = torch.searchsorted(row, row)  # the first item of the same row
        number = torch.arange(len(row), device=device) - first
        before = (place[order] - number).clamp(min=0).minimum(F.pad(text.lengths, (0, 1))[row])  # tokens of text
        total = tokens.cumsum(0) - tokens
        starts = torch.empty_like(total).scatter(0, order, before + total - total[first])
        shift = tokens.new_zeros(count + 1, width + 1).index_put((row, before), tokens, accumulate=True)[:count]
        return cls(
            text.lengths + shift.sum(1),
            torch.arange(width, device=device) + shift.cumsum(1)[:, :width],
            [part.masked_fill(part == count, -1) for part in rows.split(sizes)],
            list(starts.split(sizes)),
        )


class _Canvas:
    """Rows of one width to be filled, and one position more, for what stands nowhere."""

    def __init__(self, text: Features, width: int, firsts: Sequence[int] | None) -> None:
        self.width, self.packed = width, firsts is not None
        self.count = len(text.mask) if firsts is None else max(firsts) // width + 1
        self.nowhere = self.count * width
        device = text.mask.device
        given = [row * width for row in range(self.count)] if firsts is None else firsts
        self.firsts = torch.tensor(given, dtype=torch.long).to(device, non_blocking=True)  # where each row begins

    def filled(self, values: Tensor, where: Tensor, empty: float) -> Tensor:
        """Numbers (n,) at these positions: (B, W)."""
        blank = values.new_full((self.nowhere + 1,), empty)
        return blank.index_copy(0, where, values)[:-1].view(self.count, self.width)

    def gathered(self, tokens: Sequence[Tensor], where: Tensor) -> Tensor:
        """Tokens (n, D), n of them in all, at these positions: (B, W, D)."""
        zero = tokens[0].new_zeros(1, tokens[0].shape[1])
        index = self.filled(torch.arange(len(where), device=where.device), where, len(where))
        return torch.cat([*tokens, zero]).index_select(0, index.flatten()).unflatten(0, index.shape)

    def mask(self, lengths: Tensor) -> Tensor:
        ends = lengths.new_zeros(self.count).index_add(0, self.firsts // self.width, lengths)
        return torch.arange(self.width, device=lengths.device) < ends[:, None]

    def parts(self, lengths: Tensor, text: Features, where: Tensor) -> Tensor | None:
        if self.packed:
            begins = torch.where(lengths > 0, self.firsts, self.nowhere)
            return self.filled(torch.ones_like(begins), begins, 0).cumsum(1) - 1
        if text.parts is None:
            return None
        most = torch.iinfo(torch.long).max
        known = self.filled(text.parts.flatten(), where, most)
        following = known.flip(1).cummin(1).values.flip(1)
        return torch.where(following < most, following, known.masked_fill(known == most, 0).cummax(1).values)


def _owners(features: Features) -> Tensor:
    if features.rows is not None:
        return features.rows
    return torch.arange(len(features.mask), device=features.mask.device)


def _numbers(own: Tensor) -> Tensor:
    """The number of each item among those of its row; items are sorted by row."""
    return torch.arange(len(own), device=own.device) - torch.searchsorted(own, own)


def _planned(owners: Sequence[Tensor], names: Sequence[str], plan: Plan) -> list[Tensor]:
    found = []
    for name, own in zip(names, owners, strict=True):
        places = F.pad(plan.places[name], (0, 1), value=-1)  # of one that is in no row, as stands for a missing one
        found.append(places[own, _numbers(own).clamp(max=places.shape[1] - 1)])
    return found


def _in_front(owners: Sequence[Tensor], count: int) -> list[Tensor]:
    """Places before the text: those of one modality behind those of another."""
    before = torch.zeros(count, dtype=torch.long, device=owners[0].device)
    found = []
    for own in owners:
        found.append(_numbers(own) + before[own])
        before = before.index_add(0, own, torch.ones_like(own))
    return found


def _loss(text: Features) -> Tensor | None:
    """What is predicted of each text: what it says, else all of its tokens but the first."""
    if text.loss is not None or text.ids is None:
        return text.loss
    first = torch.zeros_like(text.mask)
    first[:, 0] = True
    if text.parts is not None:
        first[:, 1:] = text.parts[:, 1:] != text.parts[:, :-1]
    return text.mask & ~first


def _packed(lengths: Sequence[int], width: int) -> list[int] | None:
    """Where each row begins if they are put behind each other in rows of this width; None where that saves none."""
    rooms: list[int] = []
    firsts = [0] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        number = next((number for number, room in enumerate(rooms) if room >= lengths[row]), len(rooms))
        rooms += [width] if number == len(rooms) else []
        firsts[row] = number * width + (width - rooms[number] if lengths[row] else 0)
        rooms[number] -= lengths[row]
    return firsts if len(rooms) < len(lengths) else None
