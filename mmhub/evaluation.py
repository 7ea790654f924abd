"""Measure a model on held-out rows: its task's metrics on all rows and on every subset of the modalities."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmhub.batch import only, rows_with
from mmhub.data.loader import Collate, batches_of, load_batches, worker_count
from mmhub.data.sources import Rows, open_rows, require_columns
from mmhub.errors import InputError, MmhubError, UsageError
from mmhub.interfaces import Policy
from mmhub.metrics import measure
from mmhub.model import Model


@dataclass
class Tally:
    """Predictions and references of one subset of modalities, and its summed loss."""

    predictions: list[dict[str, Any]] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    loss: float | None = None

    def report(self, metrics: Sequence[str]) -> dict[str, float]:
        count = len(self.references)
        loss = {} if self.loss is None else {"loss": self.loss / count}
        return measure(metrics, self.predictions, self.references) | loss


@dataclass(frozen=True)
class EvalOptions:
    """How to run an evaluation; none of these changes a result."""

    batch_size: int = 64
    workers: int | str = "auto"
    subsets: bool = True
    skip: bool = False
    policy: Policy = field(default_factory=Policy)
    precision: torch.dtype = torch.float32
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None


def evaluate(
    model: Model | str | os.PathLike[str],
    data: Any,
    *,
    inputs: Mapping[str, str] | None = None,
    target: str = "",
    columns: Sequence[str] = (),
    options: EvalOptions | None = None,
) -> dict[str, Any]:
    """Measure a model, or the model of that name, on `data`.

    `data` is anything a recipe's `data.train` may be, `Rows`, or a list of rows, each a dict of column to value.

    `inputs` (modality -> column), `target` and `columns` default to what the checkpoint was trained with. Returns
    {"name", "task", "rows", "skipped", "metrics", "subsets"}; a subset counts the rows that have all its modalities.

    Raises:
        UsageError: a column is missing. InputError: a row cannot be read (unless `options.skip`).
    """
    if isinstance(model, (str, os.PathLike)):
        from mmhub.hub import load

        model = load(model)
    rows = data if isinstance(data, Rows) else open_rows(data, columns=list(columns or model.columns.names) or None)
    wanted = input_columns(model, rows, inputs)
    target = target or model.columns.target
    if not target:
        raise UsageError("no target column is known", "add --target-column NAME")
    require_columns(rows, [target], "name the column with --target-column")
    tallies, skipped = _run(model, rows, wanted, target, options or EvalOptions())
    everything = tallies.pop(())
    if not everything.references:
        raise InputError(f"none of the {len(rows)} rows could be evaluated", "check the data")
    return {
        "name": model.name,
        "task": model.task.name,
        "rows": len(everything.references),
        "skipped": skipped,
        "metrics": everything.report(model.task.metrics),
        "subsets": {
            "+".join(subset): tally.report(model.task.metrics) | {"rows": len(tally.references)}
            for subset, tally in tallies.items()
            if tally.references
        },
    }


def input_columns(model: Model, rows: Rows, inputs: Mapping[str, str] | None) -> dict[str, str]:
    """Decide which column feeds which modality: `inputs` first, then what the model was trained with, then its name.

    A modality whose column the table lacks is missing in every row, as long as one is there.
    """
    given = dict(inputs or {})
    unknown = [name for name in given if name not in model.modalities]
    if unknown:
        raise UsageError(f"this model has no input {unknown[0]!r}", f"it takes {', '.join(model.modalities)}")
    require_columns(rows, list(given.values()), "name the columns with --inputs")
    known = {m: model.columns.inputs.get(m, m) for m in model.modalities} | given
    present = {m: column for m, column in known.items() if column in rows.columns}
    if not present:
        require_columns(rows, list(known.values()), "name the columns with --inputs")
    return present


def _run(
    model: Model, rows: Rows, inputs: Mapping[str, str], target: str, options: EvalOptions
) -> tuple[dict[tuple[str, ...], Tally], int]:
    subsets = _subsets(tuple(m for m in model.modalities if m in inputs)) if options.subsets else []
    tallies: dict[tuple[str, ...], Tally] = {subset: Tally() for subset in [(), *subsets]}
    skipped = 0
    processors = {name: model.processors[name] for name in inputs}
    collate = Collate(rows, processors, inputs, model.decoder, target, options.policy, options.skip)
    order = batches_of(range(len(rows)), options.batch_size)
    was_training = model.training
    model.eval()
    loaded = load_batches(collate, order, worker_count(options.workers, model.device))
    try:
        for part in options.progress(loaded, len(order)) if options.progress else loaded:
            skipped += len(part.skipped)
            if part.error:
                raise part.error
            if part.batch is not None:
                _measure_batch(model, part.batch, tallies, options.precision)
    finally:
        model.train(was_training)
    return tallies, skipped


@torch.inference_mode()
def _measure_batch(model: Model, batch: Any, tallies: Mapping[tuple[str, ...], Tally], precision: torch.dtype) -> None:
    batch = batch.to(model.device)
    with torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
        bundle = model.encode(batch.items, batch.size)
        references = model.decoder.references(batch.raw_targets)
        for subset, tally in tallies.items():
            keep = rows_with(bundle, subset)
            if not len(keep):
                continue
            whole = not subset or (set(subset) == set(bundle) and len(keep) == batch.size)
            part = bundle if whole else only(bundle, subset, keep)
            targets = batch.targets if whole else _pick(batch.targets, keep)
            output = model.decode(part, targets)
            tally.predictions += model.decoder.predict(output, details=False)
            tally.references += [references[i] for i in keep.tolist()]
            if output.loss is not None:
                tally.loss = (tally.loss or 0.0) + float(output.loss) * len(keep)


def _subsets(modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [subset for size in range(1, len(modalities) + 1) for subset in combinations(modalities, size)]


def _pick(targets: Any, keep: Tensor) -> Any:
    if isinstance(targets, Tensor):
        return targets[keep]
    raise MmhubError(f"cannot take rows of targets of type {type(targets).__name__}")


def data_name(source: Any) -> str:
    """A short name of a data source for cards and tables: file names without their folders."""
    if isinstance(source, Rows):
        source = source.source
    if isinstance(source, Mapping):
        return ", ".join(Path(str(value)).name for value in source.values())
    if isinstance(source, (list, tuple)):
        return ", ".join(Path(str(value)).name for value in source)
    text = str(source)
    return text if text.startswith("hub:") or not Path(text).exists() else Path(text).name
