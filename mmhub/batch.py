"""What travels between the roles: `Items` into encoders, `Features` between encoder, fusion and decoder.

One mask rule everywhere: bool, True = real, right-padded, masked positions are zero. Letters in shapes: B rows of the
batch, N items, S raw positions, T tokens, D width, V classes or vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Items:
    """The items of one modality that exist in a batch, packed.

    An absent row is a missing modality; a repeated row is several items in one sample.
    """

    data: Tensor  # (N, ...) pixels (N, C, H, W) | waveform (N, S) | ids (N, S)
    mask: Tensor  # (N, S) bool
    rows: Tensor  # (N,) long, the batch row of each item, ascending
    batch: int  # B
    marks: Tensor | None = None  # (N, S) bool, what the processor marked: where words begin, or what is trained,
    # there float as well: what each position counts in the loss
    continues: Tensor | None = None  # (B,) bool, rows whose first item goes on where the batch before stopped

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    @property
    def lengths(self) -> Tensor:
        """Real positions of each item, (N,) long."""
        return self.mask.sum(1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Items:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Items:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Items:
        known = {name: getattr(self, name) for name in _ITEM_TENSORS}
        changed: dict[str, Any] = {name: change(part) for name, part in known.items() if part is not None}
        return replace(self, **changed)


_ITEM_TENSORS = ("data", "mask", "rows", "marks", "continues")


@dataclass
class Features:
    """A sequence of vectors for each item or row, with its mask: the only thing that travels between roles."""

    tokens: Tensor  # (B or N, T, D)
    mask: Tensor  # (B or N, T) bool
    ids: Tensor | None = None  # (B, T) long, -1 where a position is not a text token
    loss: Tensor | None = None  # (B, T) bool, positions that are training targets, or float, what each counts
    pooled: Tensor | None = None  # (B or N, P), the encoder's own summary of an item when it has one
    marks: Tensor | None = None  # (B or N, T) bool, what the processor marked: where a word of the input begins
    parts: Tensor | None = None  # (B, T) long, ascending numbers of the texts of a row; None = one text a row
    continues: Tensor | None = None  # (B,) bool, rows whose first text goes on where the batch before stopped
    rows: Tensor | None = None  # (N,) long, the batch row of each item, where these are items and not rows

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    @property
    def present(self) -> Tensor:
        """Rows that hold at least one real token, (B,) bool."""
        return self.mask.any(1)

    def select(self, rows: Tensor) -> Features:
        """Return the features of these rows, (R,) long."""
        return self._each(lambda tensor: tensor[rows])

    def emptied(self) -> Features:
        """Return as many rows without any token."""

        def empty(tensor: Tensor) -> Tensor:
            return torch.zeros_like(tensor if tensor is self.pooled or tensor is self.continues else tensor[:, :1])

        return self._each(empty)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Features:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Features:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Features:
        found = {name: part for name, part in vars(self).items() if part is not None}
        return replace(self, **{name: change(part) for name, part in found.items()})

    def to_rows(self, rows: Tensor, batch: int) -> Features:
        """Gather items into batch rows: tokens of one row's items follow each other, summaries are averaged.

        Rows without an item come out fully masked and zero.
        """
        one_each = len(self.tokens) == batch and bool((rows == torch.arange(batch, device=rows.device)).all())
        if one_each:
            return self
        where, width = places_in_rows(self.mask, rows, batch)
        tokens = self.tokens.new_zeros(batch, width, self.tokens.shape[2])
        mask = self.mask.new_zeros(batch, width)
        tokens = tokens.index_put(where, self.tokens[self.mask])
        mask[where] = True
        marks = None if self.marks is None else mask.new_zeros(batch, width).index_put(where, self.marks[self.mask])
        pooled = None
        if self.pooled is not None:
            counts = torch.zeros(batch, device=rows.device).index_add_(
                0, rows, torch.ones(len(rows), device=rows.device)
            )
            pooled = self.pooled.new_zeros(batch, self.pooled.shape[1]).index_add(0, rows, self.pooled)
            pooled = pooled / counts.clamp(min=1)[:, None].to(pooled.dtype)
        return Features(tokens=tokens, mask=mask, pooled=pooled, marks=marks)


def places_in_rows(mask: Tensor, rows: Tensor, batch: int) -> tuple[tuple[Tensor, Tensor], int]:
    """Return where the real positions of items (N, S) stand once items of one row follow each other, and the width.

    The places are (row, column), each (number of real positions,); items are sorted by row.
    """
    lengths = mask.sum(1)
    totals = lengths.new_zeros(batch).index_add_(0, rows, lengths)
    before = lengths.cumsum(0) - lengths  # positions of all earlier items
    first = (totals.cumsum(0) - totals)[rows]  # positions of all earlier rows
    position = (before - first)[:, None] + torch.arange(mask.shape[1], device=rows.device)[None]
    width = max(int(totals.max()), 1) if batch else 1
    return (rows[:, None].expand(mask.shape)[mask], position[mask]), width


Bundle = dict[str, Features]  # "text", "image", "audio", ..., "fused"


def rows_with(bundle: Bundle, names: Sequence[str]) -> Tensor:
    """The numbers of the rows in which all of `names` are present, (R,) long."""
    masks = [bundle[name].present for name in names]
    present = torch.stack(masks).all(0) if masks else next(iter(bundle.values())).present | True
    return present.nonzero().squeeze(1)


def begun(text: Features, lengths: Tensor) -> Features:
    """Return the first tokens of each row alone, `lengths` (B,) of them."""
    mask = text.mask & (torch.arange(text.mask.shape[1], device=text.mask.device) < lengths[:, None])
    width = max(int(mask.sum(1).max()), 1) if len(mask) else 1
    mask = mask[:, :width]
    tokens = text.tokens[:, :width] * mask[..., None].to(text.tokens.dtype)
    ids = None if text.ids is None else text.ids[:, :width].masked_fill(~mask, -1)
    return Features(tokens, mask, ids=ids)


def only(bundle: Bundle, names: Sequence[str], rows: Tensor) -> Bundle:
    """The given rows with the streams in `names` alone, the others as if they had never been there."""
    parts: Bundle = {}
    for name, features in bundle.items():
        found = features.select(rows)
        parts[name] = found if name in names else found.emptied()
    return parts


@dataclass
class Output:
    """What a decoder returns: logits, the mean loss when targets were given, and the mask of real positions."""

    logits: Tensor  # (B, V) or (B, T, V)
    loss: Tensor | None = None  # ()
    mask: Tensor | None = None  # (B,) or (B, T) bool


@dataclass
class Encoded:
    """Items of one modality that their encoder has seen already, packed as in `Items`."""

    features: Features  # (N, ...)
    rows: Tensor  # (N,) long, the batch row of each item, ascending

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Encoded:
        return Encoded(self.features.to(device, non_blocking), self.rows.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Encoded:
        return Encoded(self.features.pin_memory(), self.rows.pin_memory())


@dataclass
class Plan:
    """Where media stand in what a language model reads.

    A row is a sequence of places, each of them one token of text or one item of another modality. `places[name]`,
    (B, K) long, are those of a row's items in their order, -1 beyond its last; the text fills the others in its order.
    """

    places: dict[str, Tensor]

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[str, int]]], names: Sequence[str]) -> Plan:
        """Build from each row's (modality, place) of its items in the order in which they are packed."""
        found = {}
        for name in names:
            own = [[place for modality, place in row if modality == name] for row in rows]
            width = max(map(len, own), default=0)
            padded = [places + [-1] * (width - len(places)) for places in own]
            found[name] = torch.tensor(padded, dtype=torch.long).view(len(rows), width)
        return cls(found)

    def select(self, rows: Any) -> Plan:
        """Return the plan of these rows, given as an index or a slice."""
        return Plan({name: places[rows] for name, places in self.places.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Plan:
        return Plan({name: places.to(device, non_blocking=non_blocking) for name, places in self.places.items()})

    def pin_memory(self) -> Plan:
        return Plan({name: places.pin_memory() for name, places in self.places.items()})


@dataclass
class Batch:
    """One collated batch: items by modality, encoded targets, and where the rows came from.

    A modality is either in `items` or, where a frozen encoder has run before, in `features`.
    """

    items: dict[str, Items]
    size: int
    targets: Any = None  # what Decoder.encode_targets returned
    raw_targets: list[Any] = field(default_factory=list)
    index: list[int] = field(default_factory=list)  # row numbers in the data source
    features: dict[str, Encoded] = field(default_factory=dict)
    weights: Tensor | None = None  # (B,) what each row counts in the mean loss, such as its tokens; None = the same
    raw: list[dict[str, Any]] = field(default_factory=list)  # raw inputs, for decoders whose answers point into them
    plan: Plan | None = None  # where media stand in the text, for language models that read both
    prompts: Tensor | None = None  # (B,) long, tokens of each row's text before the answer that is to be written
    shortened: int = 0  # rows, conversations, of which turns were left out

    @property
    def weight(self) -> float:
        """What the batch counts beside others: its rows, or their targets where the loss is a mean over those."""
        return float(self.size) if self.weights is None else float(self.weights.sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        items = {name: part.to(device, non_blocking) for name, part in self.items.items()}
        features = {name: part.to(device, non_blocking) for name, part in self.features.items()}
        targets = self.targets
        if isinstance(targets, Tensor):
            targets = targets.to(device, non_blocking=non_blocking)
        plan = None if self.plan is None else self.plan.to(device, non_blocking)
        return replace(self, items=items, targets=targets, features=features, plan=plan)

    def pin_memory(self) -> Batch:
        items = {name: part.pin_memory() for name, part in self.items.items()}
        features = {name: part.pin_memory() for name, part in self.features.items()}
        targets = self.targets.pin_memory() if isinstance(self.targets, Tensor) else self.targets
        plan = None if self.plan is None else self.plan.pin_memory()
        return replace(self, items=items, targets=targets, features=features, plan=plan)

    def split(self, pieces: int) -> list[Batch]:
        """Cut the rows into at most `pieces` batches of nearly equal size."""
        step = math.ceil(self.size / pieces)
        return [self._rows(start, min(start + step, self.size)) for start in range(0, self.size, step)]

    def _rows(self, start: int, end: int) -> Batch:
        rows = slice(start, end)
        return Batch(
            items={name: _items_of(part, start, end) for name, part in self.items.items()},
            size=end - start,
            targets=self.targets[rows] if self.targets is not None else None,
            weights=None if self.weights is None else self.weights[rows],
            raw=self.raw[rows],
            raw_targets=self.raw_targets[rows],
            index=self.index[rows],
            features={name: _encoded_of(part, start, end) for name, part in self.features.items()},
            plan=None if self.plan is None else self.plan.select(rows),
            prompts=None if self.prompts is None else self.prompts[rows],
        )


def _items_of(items: Items, start: int, end: int) -> Items:
    """The items of the rows from `start` to `end`, without padding that none of them needs."""
    keep = (items.rows >= start) & (items.rows < end)
    data, mask = items.data[keep], items.mask[keep]
    width = max(int(mask.sum(1).max()), 1) if len(mask) and mask.shape[1] else mask.shape[1]
    data = data[:, :width] if data.ndim > 1 and data.shape[1] == mask.shape[1] else data
    marks = None if items.marks is None else items.marks[keep][:, :width]
    continues = None if items.continues is None else items.continues[start:end]
    return Items(data, mask[:, :width], items.rows[keep] - start, end - start, marks, continues)


def _encoded_of(encoded: Encoded, start: int, end: int) -> Encoded:
    keep = (encoded.rows >= start) & (encoded.rows < end)
    features = encoded.features
    pooled = None if features.pooled is None else features.pooled[keep]
    return Encoded(
        replace(features, tokens=features.tokens[keep], mask=features.mask[keep], pooled=pooled),
        encoded.rows[keep] - start,
    )


def pad_sequences(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Right-pad N >= 1 tensors of shape (S_i, ...) with zeros to (N, S, ...); return them with their (N, S) mask."""
    longest = max(len(sequence) for sequence in sequences)
    data = sequences[0].new_zeros(len(sequences), longest, *sequences[0].shape[1:])
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        data[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = True
    return data, mask
