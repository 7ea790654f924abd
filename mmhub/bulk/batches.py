"""Answers by batches of rows of like length, for models that answer in one pass; texts are read once.

One thread reads and measures the next window, one decodes the next batch, or `workers` processes do, while the model
computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmhub.batch import Batch
from mmhub.bulk.rows import Table, sample_of
from mmhub.bulk.windows import Answer, Window
from mmhub.data.lengths import Lengths, measure_rows
from mmhub.data.loader import Loaded, load_batches, on_device
from mmhub.data.plan import plan_in_order
from mmhub.data.windows import ahead
from mmhub.errors import InputError, MmhubError
from mmhub.interfaces import Policy

Numbers = NDArray[np.int64]  # what was read of an input; no tensors, each of which would be an open file on its way

ROWS = 32  # of a batch, where all rows are of the same length
MANY_ROWS = 256  # where they are not, and the budget of tokens is what bounds it


@dataclass
class Entry:
    """A row on its way into a batch: its window and its place there, its sample, and what was read of it."""

    window: Window
    place: int
    sample: Mapping[str, Any]
    read: Mapping[str, list[Numbers] | None]


@dataclass
class Read(Loaded):
    """A batch, the rows it is of, and those that could not be read, each as its place among the entries."""

    rows: list[int] = field(default_factory=list)
    failed: list[tuple[int, InputError]] = field(default_factory=list)


@dataclass
class Collate:
    """Decodes samples and packs them; those that cannot be read are left out."""

    processors: Mapping[str, Any]
    policy: Policy
    rows: Any = None  # what `load_batches` would look rows up in: entries bring theirs along
    columns: None = None

    def __call__(self, entries: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Read:
        rows: list[dict[str, list[Tensor]]] = []
        found = Read()
        for number, (sample, read) in enumerate(entries):
            try:
                rows.append({name: self._row(name, sample.get(name), read.get(name)) for name in self.processors})
                found.rows.append(number)
            except InputError as error:
                found.failed.append((number, error))
        if rows:
            items = {name: part.pack_rows([row[name] for row in rows]) for name, part in self.processors.items()}
            found.batch = Batch(items, len(rows), raw=[dict(entries[number][0]) for number in found.rows])
        return found

    def _row(self, name: str, raw: Any, read: list[Numbers] | None) -> list[Tensor]:
        if read is not None:
            return list(map(torch.from_numpy, read))
        items: list[Tensor] = self.processors[name].read_row(raw, self.policy)
        return items


@dataclass
class Batches:
    """Answers windows; `failed(window, place, error)` is told of rows that cannot be read, or raises.

    A batch has at most `rows` rows (0: as many as suit the model) and `tokens` padded tokens.
    """

    model: Any
    table: Table
    inputs: Mapping[str, str]
    policy: Policy
    failed: Callable[[Window, int, InputError], None]
    rows: int = 0
    tokens: int = 0
    workers: int = 0

    def answer(self, windows: Iterator[Window]) -> Generator[tuple[Window, int], None, None]:
        """Fill in the answers; yield after each batch its window and the number of rows that are answered."""
        sent: deque[list[Entry] | _Bad] = deque()  # in the order in which batches come back

        def order(prepared: Iterator[list[list[Entry] | _Bad]]) -> Iterator[list[Any]]:
            for part in chain.from_iterable(prepared):
                sent.append(part)
                yield [(entry.sample, entry.read) for entry in part] if isinstance(part, list) else []

        pinned = self.model.device.type == "cuda"
        workers = self.workers if self._decodes() else 0
        collate: Any = Collate(self.model.processors, self.policy)
        with ExitStack() as stack:
            prepared = stack.enter_context(closing(ahead(self._prepared(windows), wait=True)))
            loaded = load_batches(collate, order(prepared), workers, pinned)
            loaded = loaded if workers else stack.enter_context(closing(ahead(loaded, wait=True)))
            for found in on_device(loaded, self.model.device):
                part = sent.popleft()
                if not isinstance(part, list):
                    part.tell(self.failed)
                    yield part.window, 1
                elif part:
                    self._fill(part, found)  # type: ignore[arg-type]
                    yield part[0].window, len(part)

    def _decodes(self) -> bool:
        """Is there more to decode than what is read to be measured?"""
        parts = [self.model.processors[name] for name in self.inputs]
        return any(part.fixed_length or not part.keeps_read or part.augments for part in parts)

    def _fill(self, entries: list[Entry], found: Read) -> None:
        for number, error in found.failed:
            self.failed(entries[number].window, entries[number].place, error)
        kept = [entries[number] for number in found.rows]
        if found.batch is None:
            return
        try:
            answers = self._compute(found.batch)
        except InputError as error:  # of a decoder that points into its input
            bad = kept.pop(error.row or 0)
            self.failed(bad.window, bad.place, error)
            again = Collate(self.model.processors, self.policy)([(entry.sample, entry.read) for entry in kept])
            again.batch = again.batch.to(self.model.device) if again.batch else None
            self._fill(kept, again)
        else:
            for entry, answer in zip(kept, answers, strict=True):
                entry.window.answers[entry.place] = answer

    @torch.inference_mode()
    def _compute(self, batch: Batch) -> list[Answer]:
        answers: list[Answer] = self.model.answers(batch, self.model(batch))
        return answers

    def _prepared(self, windows: Iterator[Window]) -> Iterator[list[list[Entry] | _Bad]]:
        """Yield each window's batches of entries; whatever fails comes in its turn, and not before."""
        try:
            for window in windows:
                yield self._batches(window)
        except MmhubError as error:
            yield [_Bad(None, 0, error)]

    def _batches(self, window: Window) -> list[list[Entry] | _Bad]:
        entries: list[Entry] = []
        found: list[list[Entry] | _Bad] = []
        for place, row in enumerate(window.rows):
            try:
                if isinstance(row.cells, InputError):
                    raise row.cells
                sample = sample_of(self.model, row.cells, self.inputs, self.table.folder(row.place))
                self.model.check_sample(0, sample)
                entries.append(Entry(window, place, sample, {}))
            except InputError as error:
                found.append(_Bad(window, place, error))
        if not entries:
            return found
        lengths = self._measure(window, entries)
        for number, entry in enumerate(entries):
            entry.read = {name: _numbers(read.row(number)) for name, read in lengths.read.items()}
        rows = self.rows or (MANY_ROWS if lengths.varying and self.tokens else ROWS)
        plan = plan_in_order(len(entries), lengths, batch_size=rows, batch_tokens=self.tokens)
        return found + [[entries[place] for place in sorted(places)] for places in plan]

    def _measure(self, window: Window, entries: Sequence[Entry]) -> Lengths:
        model = self.model
        numbered: list[tuple[int, Any]] = [(entry.place, window.rows[entry.place].cells) for entry in entries]
        return measure_rows(
            numbered,
            model.processors,
            model.readers,
            self.inputs,
            self.policy,
            folder=lambda place: self.table.folder(window.rows[place].place),
        )


def _numbers(items: list[Tensor] | None) -> list[Numbers] | None:
    return None if items is None else [item.numpy() for item in items]


@dataclass(frozen=True)
class _Bad:
    """A row that cannot be read, or, without a window, the end of reading."""

    window: Any
    place: int
    error: MmhubError

    def tell(self, failed: Callable[[Window, int, InputError], None]) -> None:
        if self.window is None or not isinstance(self.error, InputError):
            raise self.error
        failed(self.window, self.place, self.error)
