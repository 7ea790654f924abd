"""From rows to batches: decode, pack and order, deterministically by seed, epoch and row, whatever the worker count."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mmhub.batch import Batch
from mmhub.data.sources import Rows
from mmhub.errors import InputError
from mmhub.interfaces import Decoder, Policy


@dataclass
class Loaded:
    """What a worker returns: a batch, or the error that stops the run; errors of skipped rows as text."""

    batch: Batch | None = None
    error: InputError | None = None
    skipped: list[str] = field(default_factory=list)

    def pin_memory(self) -> Loaded:
        return replace(self, batch=self.batch.pin_memory() if self.batch else None)


class _Indexed(Dataset[tuple[int, dict[str, Any]]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self.rows[index]


@dataclass
class Collate:
    """Turn table rows into a batch.

    `seed` switches training-time augmentation on; it and the row number alone decide what happens to a row.
    """

    rows: Rows
    processors: Mapping[str, Any]
    inputs: Mapping[str, str]  # modality -> column
    decoder: Decoder | None = None
    target: str = ""
    policy: Policy = field(default_factory=Policy)
    skip: bool = False
    seed: int | None = None

    def __call__(self, samples: Sequence[tuple[int, Mapping[str, Any]]]) -> Loaded:
        kept = list(samples)
        skipped: list[str] = []
        while kept:
            try:
                return Loaded(self._batch(kept), skipped=skipped)
            except InputError as error:
                if error.row is None or not self.skip:
                    return Loaded(error=self._explain(error, kept), skipped=skipped)
                skipped.append(str(self._explain(error, kept)))
                del kept[error.row]
        return Loaded(skipped=skipped)

    def _batch(self, samples: Sequence[tuple[int, Mapping[str, Any]]]) -> Batch:
        alone = len(self.inputs) == 1
        raw = {
            modality: [usable(modality, row.get(column), self.rows.folder(i), alone) for i, row in samples]
            for modality, column in self.inputs.items()
        }
        for position in range(len(samples)):
            if all(values[position] is None for values in raw.values()):
                raise _EmptyRow(f"none of {', '.join(self.inputs.values())} is given", position)
        seeds = None if self.seed is None else [row_seed(self.seed, i) for i, _ in samples]
        items = {name: self.processors[name](values, self.policy, seeds) for name, values in raw.items()}
        batch = Batch(items=items, size=len(samples), index=[i for i, _ in samples])
        if self.decoder is not None and self.target:
            batch.raw_targets = [row.get(self.target) for _, row in samples]
            batch.targets = self.decoder.encode_targets(batch.raw_targets)
        return batch

    def _explain(self, error: InputError, samples: Sequence[tuple[int, Any]]) -> InputError:
        if error.row is None:
            return error
        column = "" if isinstance(error, _EmptyRow) else self.inputs.get(error.modality or "", self.target)
        place = self.rows.where(samples[error.row][0]) + (f", column '{column}'" if column else "")
        hint = error.hint or ('fix the row, or set data.on_error = "skip"' if not self.skip else None)
        return InputError(f"{place}: {error.message}", hint)


class _EmptyRow(InputError):
    """A row without any input; unlike other errors without a modality it is not about the target."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def usable(modality: str, value: Any, folder: Path | None = None, alone: bool = True) -> Any:
    """Return a cell's raw input, None where the cell is empty. A relative path is looked for beside the table first.

    The empty text is a text where text is the only input (`alone`), and a missing one beside others. A list of raw
    inputs loses those that are missing; a list that holds numbers is data, and its gaps are part of it.
    """
    if isinstance(value, Mapping) and value.get("bytes") is None and "array" not in value:
        return usable(modality, value.get("path"), folder, alone)
    if isinstance(value, (list, tuple)) and not _holds_number(value):
        return [part for item in value if (part := usable(modality, item, folder, alone)) is not None] or None
    if isinstance(value, float) and math.isnan(value):  # pandas' missing value
        return None
    if not isinstance(value, str):
        return value
    if modality == "text":
        return value if value or alone else None
    if value and folder is not None and os.path.exists(folder / value):  # Path.exists raises for a very long text
        return folder / value
    return value or None


def _holds_number(value: Any) -> bool:
    """Is there a number, and no mere NaN, in a list or a list inside it?"""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_number, value))
    return isinstance(value, (int, float)) and value == value


def row_seed(seed: int, row: int) -> int:
    """A seed for one row, independent of batches and workers."""
    return (seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9 + 1) % 2**63


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The shuffled row order of an epoch."""
    generator = torch.Generator().manual_seed(row_seed(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def batches_of(order: Sequence[int], size: int) -> list[list[int]]:
    """Cut an order into batches; the last may be smaller."""
    return [list(order[i : i + size]) for i in range(0, len(order), size)]


def load_batches(
    collate: Collate, order: Sequence[Sequence[int]], workers: int = 0, pin_memory: bool = False
) -> Iterator[Loaded]:
    """Yield what `collate` makes of each list of row numbers, in order, decoding in `workers` processes."""
    loader = DataLoader(
        _Indexed(collate.rows),
        batch_sampler=order,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws a seed, which must not come from the run's random state
    )
    yield from loader


def worker_count(choice: int | str, device: torch.device) -> int:
    """'auto' decodes in worker processes only beside a GPU: on a CPU they would take the cores from training."""
    if choice != "auto":
        return int(choice)
    return min(8, max(1, (os.cpu_count() or 2) - 1)) if device.type == "cuda" else 0
