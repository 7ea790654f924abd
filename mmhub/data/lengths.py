"""How long the inputs of each row are, known before training from headers and from texts; what batches are cut by.

Reading a text is how it is measured, so its token ids are kept and read once in a run. Nothing else is decoded here.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmhub.data.cells import cell
from mmhub.data.loader import ReadItems, two_items, usable
from mmhub.data.sources import Rows
from mmhub.data.talks import LongTalk, ReadTalks, TalkReader, TalkStore
from mmhub.errors import InputError
from mmhub.interfaces import Policy

Progress = Callable[[int, int], None]  # inputs that are measured, and all of them

KEPT_BYTES = 2**30  # of memory that what was read may take, in all modalities together
_EVERY = 1000  # rows between calls of progress
_TRIES = 100  # rows among which one usable input of fixed length is looked for


@dataclass(frozen=True)
class Lengths:
    """Sizes of rows by modality, (rows,) each: 0 where a row lacks it or cannot be read; several items add up.

    Attributes:
        positions: raw positions, such as samples. tokens: what the encoder makes of them. read: what was read.
        talks: of conversations what was read, all modalities together.
    """

    positions: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    tokens: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    read: Mapping[str, ReadItems] = field(default_factory=dict)
    talks: ReadTalks | None = None

    @property
    def varying(self) -> list[str]:
        """Modalities whose rows differ in length, the one that costs most tokens first."""
        names = [name for name, found in self.positions.items() if len(found) and found.min() != found.max()]
        return sorted(names, key=lambda name: -int(self.tokens[name].sum()))


def measure_rows(
    rows: Rows | Sequence[tuple[int, Mapping[str, Any]]],
    processors: Mapping[str, Any],
    readers: Any,
    inputs: Mapping[str, str],
    policy: Policy | None = None,
    progress: Progress | None = None,
    folder: Callable[[int], Path | None] | None = None,
    pairs: bool = False,
) -> Lengths:
    """Measure the inputs of all rows; `inputs` maps modality to column, `readers` modality to encoder
    (or a decoder that reads text).

    Rows of a stream are pairs of number and row; `folder` tells the folder from which relative paths in a row of that
    number start (`Stream.folder`), as it does where they are decoded.
    With `pairs` the two of a pair of texts are items of their own, as a decoder of pairs reads them.
    A modality of fixed length is taken to be in every row, unseen. Addresses are not fetched to be measured, and a row
    that cannot be read has length 0: whoever decodes it will say what is wrong.
    """
    policy = replace(policy or Policy(), urls=False)
    variable = [name for name in inputs if not processors[name].fixed_length]
    total, space = len(variable) * len(rows), KEPT_BYTES
    tell = progress or (lambda done, total: None)
    sizes: dict[str, NDArray[np.int64]] = {}
    read: dict[str, ReadItems] = {}
    for name, column in inputs.items():
        meter = _Meter(processors[name], readers[name].token_count, policy, space)
        values = _values(rows, name, column, len(inputs) == 1, folder)
        values = map(two_items, values) if pairs else values
        if name not in variable:
            first = next((size for value in islice(values, _TRIES) if (size := meter.measure(value))[0]), (0, 0))
            sizes[name] = np.tile(np.array(first, np.int64)[:, None], len(rows))
            continue
        sizes[name] = np.zeros((2, len(rows)), np.int64)
        for row, value in enumerate(values):
            sizes[name][:, row] = meter.measure(value)
            if row % _EVERY == 0:
                tell(variable.index(name) * len(rows) + row, total)
        if meter.keeps:
            read[name] = meter.items()
            space -= read[name].bytes
    tell(total, total)
    positions, tokens = ({name: size[i] for name, size in sizes.items()} for i in (0, 1))
    return Lengths(positions, tokens, read)


def measure_talks(
    rows: Rows | Sequence[tuple[int, Mapping[str, Any]]],
    reader: TalkReader,
    folder: Callable[[int], Path | None] | None = None,
) -> Lengths:
    """Measure and lay out conversations, each as the `reader` fits it into what the model reads at once.

    Tokens are those that the language model reads. Rows, `folder`, addresses, and rows that cannot be read are as for
    `measure_rows`.
    """
    reader = replace(reader, policy=replace(reader.policy, urls=False))
    names = ["text", *reader.media]
    positions, tokens = (np.zeros((len(names), len(rows)), np.int64) for _ in range(2))
    store = TalkStore(names, KEPT_BYTES)
    start = (rows.folder if isinstance(rows, Rows) else folder) or (lambda number: None)
    for place, (number, row) in enumerate(enumerate(rows) if isinstance(rows, Rows) else rows):
        try:
            talk = reader.read(row, start(number))
            sizes = reader.positions(talk.messages) | {"text": [len(talk.script.ids)]}
        except LongTalk as error:
            store.add_long(error)
            continue
        except InputError:
            store.add(None)
            continue
        store.add(talk)
        for at, name in enumerate(names):
            positions[at, place] = sum(sizes[name])
            tokens[at, place] = sum(sizes[name] if name == "text" else (reader.tokens(name, n) for n in sizes[name]))
    by_name = [{name: part[at] for at, name in enumerate(names)} for part in (positions, tokens)]
    return Lengths(by_name[0], by_name[1], talks=store.rows())


def _values(
    rows: Any, modality: str, column: str, alone: bool, folder: Callable[[int], Path | None] | None
) -> Iterator[Any]:
    """Yield the raw inputs of one modality, None for a row without."""
    if isinstance(rows, Rows):
        cells = rows.column(column)
        return (usable(modality, cell, rows.folder(i), alone) for i, cell in enumerate(cells))
    start = folder or (lambda number: None)
    values = (usable(modality, cell(row, column), start(number), alone) for number, row in rows)
    return values if modality == "text" else map(_placed, values)


def _placed(value: Any) -> Any:
    """Take what is found from the current folder alone for missing: batches must not depend on that folder."""
    if isinstance(value, list):
        return [part for part in value if not (isinstance(part, str) and _is_here(part))]
    return None if isinstance(value, str) and _is_here(value) else value


def _is_here(text: str) -> bool:
    return not os.path.isabs(text) and os.path.exists(text)


class _Meter:
    """Measures the inputs of one modality; what a processor may keep is read, and kept while there is space."""

    def __init__(self, processor: Any, count: Callable[[int], int], policy: Policy, space: int) -> None:
        self.processor, self.policy, self.space = processor, policy, space
        self.keeps = processor.keeps_read and not processor.augments
        self._count, self._counts = count, dict[int, int]()
        self._numbers, self._ends, self._items, self._read = array("i"), array("q"), array("q"), array("b")

    def measure(self, value: Any) -> tuple[int, int]:
        """Return positions and tokens of one row's inputs."""
        try:
            if self.keeps:
                read = self.processor.read_row(value, self.policy)
                self._keep(read)
                sizes = [len(item) for item in read]
            else:
                sizes = [self.processor.length(item, self.policy) for item in self.processor.items_of(value)]
        except InputError:
            if self.keeps:
                self._keep(None)
            return 0, 0
        return sum(sizes), sum(map(self._tokens, sizes))

    def items(self) -> ReadItems:
        parts = (self._numbers, self._ends, self._items, self._read)
        numbers, ends, items, read = (np.asarray(part, part.typecode) for part in parts)
        return ReadItems(numbers, ends, items, read.view(np.bool_))

    def _tokens(self, size: int) -> int:
        if size not in self._counts:
            self._counts[size] = self._count(size)
        return self._counts[size]

    def _keep(self, read: list[Tensor] | None) -> None:
        size = 17 + sum(8 + 4 * len(item) for item in read or ())  # bytes, bookkeeping included
        fits = read is not None and size <= self.space
        if read is not None and fits:
            self.space -= size
            for item in read:
                self._numbers.frombytes(item.numpy().astype(np.int32).tobytes())
                self._ends.append(len(self._numbers))
        self._items.append(len(self._ends))
        self._read.append(fits)
