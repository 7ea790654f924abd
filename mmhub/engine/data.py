"""The rows a run trains and validates on: opened, and checked before anything is built."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from mmhub.build import local_name, reads_text_itself
from mmhub.checkpoint import DataRecord, is_checkpoint, read_config
from mmhub.config import Recipe, read_recipe
from mmhub.data.addresses import expand_braces
from mmhub.data.cells import parts_of
from mmhub.data.corpus import documents
from mmhub.data.inputs import Anything, usable
from mmhub.data.loader import epoch_order
from mmhub.data.sources import Rows, open_rows, require_columns
from mmhub.data.stream import Stream, open_stream, wants_stream
from mmhub.data.talks import read_talk, talk_column, target_texts
from mmhub.errors import InputError, UsageError
from mmhub.hub.pull import load, pull
from mmhub.interfaces import Task, find_task
from mmhub.model import Columns, Model

_HASHED = 2**31  # bytes of training data that are hashed at the start, to notice on resuming that they have changed


class TrainingData:
    """Training rows by position or as a stream, validation rows, and which column feeds what.

    Raises:
        UsageError: no data is named, or a column is missing. InputError, NotFoundError: a source cannot be read.
    """

    def __init__(self, recipe: Recipe, task: Task, folder: Path | None) -> None:
        self.recipe, self.task = recipe, task
        self.target = "" if task.reads_text else recipe.data.target or task.target
        self.inputs = _inputs(recipe, task, folder)
        if task.reads_text and recipe.data.target:
            raise UsageError(f"{task.name} has no target column", "remove data.target: the texts themselves are it")
        if not (task.reads_text or task.converses or task.paired or self.target or task.name == "embedding"):
            raise UsageError(f"{task.name} needs a target column", 'add target = "COLUMN" under [data]')
        self.rows, self.valid = self._open(folder)

    @property
    def columns(self) -> Columns:
        data = self.recipe.data
        return Columns(self.inputs, self.target, tuple(data.columns), self.document)

    @property
    def document(self) -> str:
        """What one text of a language model is."""
        return self.recipe.data.document or "row"

    @property
    def count(self) -> int | None:
        """The number of training rows, None for a stream that does not know."""
        return self.rows.rows if isinstance(self.rows, Stream) else len(self.rows)

    def values(self, name: str) -> Iterable[Any]:
        """Yield all training values of a modality, or of "target"; what parts of a model learn from before training."""
        if self.task.reads_text and name == "text":
            skips = self.recipe.data.on_error == "skip"  # what is skipped is told when it is read for training
            skipped: list[str] | None = [] if skips else None
            return (text for _, text in documents(self.rows, self.inputs["text"], self.document, skipped))
        if name == "messages":
            return self._talks()
        if name != "target":
            if name not in self.inputs:  # the question of a language model that is given none
                return ()
            alone, column = len(self.inputs) == 1, self.inputs[name]
            cells = self.rows.cells(column) if isinstance(self.rows, Stream) else enumerate(self.rows.column(column))
            return (usable(name, cell, self.rows.folder(i), alone) for i, cell in cells)
        if not self.target:
            return ()
        values = self.rows.column(self.target)
        if self.recipe.data.on_error == "stop":
            return values
        return (v for v in values if v is not None and v != "" and v == v)  # rows without a target will be skipped

    def _talks(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows as conversations with their answers; of those that are none training will say so."""
        numbered = self.rows.numbered() if isinstance(self.rows, Stream) else enumerate(self.rows)
        for number, row in numbered:
            with suppress(InputError):
                yield self._talk(self.rows, number, row)

    def _talk(self, rows: Rows | Stream, number: int, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        inputs = {name: column for name, column in self.inputs.items() if name == "text" or not self.target}
        return read_talk(row, inputs, self.target, Anything(inputs), rows.folder(number))[0]

    def check_talks(self) -> None:
        """Try the first rows as conversations; a table of anything else is better known before the first stage.

        Raises:
            InputError: one is none, unless such rows are skipped.
        """
        if not self.task.converses or self.recipe.data.on_error == "skip":
            return
        for rows in (rows for rows in (self.rows, self.valid) if isinstance(rows, Rows)):
            for number in range(min(len(rows), 8)):
                try:
                    self._talk(rows, number, rows[number])
                except InputError as error:
                    place = f"{rows.where(number)}, column '{self.inputs.get(error.modality or '', self.target)}'"
                    raise InputError(f"{place}: {error.message}", error.hint) from None

    def check_targets(self, model: Model) -> None:
        """Try the targets now: a label unseen in training must not end a run after its first epoch."""
        if not self.target or self.recipe.data.on_error == "skip":
            return
        kept_decoder = self.recipe.model.base and not self.recipe.model.decoder
        for rows in (self.rows if kept_decoder else None, self.valid):
            values: Iterator[Any] = iter(rows.column(self.target)) if rows is not None else iter(())
            start = 0
            while part := list(islice(values, 1024)):
                try:
                    self._try(model, part, measured=rows is self.valid)
                except InputError as error:
                    raise self.at_target(start + (error.row or 0), error, rows) from None
                start += len(part)

    @staticmethod
    def _try(model: Model, targets: list[Any], *, measured: bool) -> None:
        """Encode targets, or where that takes their inputs, too, look at their form alone."""
        decoder: Any = model.decoder
        if model.converses:
            _check_texts(targets)
            return
        encode = decoder.encode_references if measured else decoder.encode_targets
        (decoder.references if hasattr(decoder, "encode_pointed") else encode)(targets)

    def at_target(self, row: int, error: InputError, rows: Any = None) -> InputError:
        """Say which target is wrong, and what can be done."""
        rows = self.rows if rows is None else rows
        hint = error.hint or 'fix the row, or set data.on_error = "skip"'
        if self.recipe.model.base and not self.recipe.model.decoder:
            hint = f'to learn other targets, give the model a new head: [model.decoder] use = "{self.task.decoder}"'
        place = f"column '{self.target}'" if isinstance(rows, Stream) else f"{rows.where(row)}, column '{self.target}'"
        return InputError(f"{place}: {error.message}", hint)

    def fingerprint(self) -> str:
        """Return a hash of what the training rows are read from, '' where finding out would take long."""
        if isinstance(self.rows, Stream) or self.rows.bytes > _HASHED:
            return ""
        facts = self.rows.fingerprint()
        known = [facts["rows"], facts.get("revision"), facts.get("selection"), [f["sha256"] for f in facts["files"]]]
        return hashlib.sha256(msgspec.json.encode(known)).hexdigest()

    def _open(self, folder: Path | None) -> tuple[Rows | Stream, Rows | None]:
        data = self.recipe.data
        if not data.train and not data.mix:
            raise UsageError("the recipe names no training data", 'add train = "FILE" under [data]')
        names, hint = data.columns or None, "see inputs and target under [data]"
        wanted = [*self.inputs.values(), *([self.target] if self.target else [])]
        streamed = wants_stream(data)
        rows: Any = open_stream(data, folder) if streamed else open_rows(data.train, columns=names, base=folder)
        require_columns(rows, wanted, hint)
        pair = next((m for m, c in self.inputs.items() if m != "text" and len(parts_of(c, rows.columns)) > 1), None)
        if pair is not None:
            raise UsageError(
                f"data.inputs.{pair} is the pair {self.inputs[pair]!r}, and only texts make one", "name one column"
            )
        if isinstance(rows, Stream):
            if self.task.reads_text and self.document != "row":
                hint = 'leave data.stream out, or write whole documents as rows and set data.document = "row"'
                raise UsageError(
                    f"the rows of a stream come in any order, and data.document is {self.document!r}", hint
                )
            rows = rows.only(wanted)
        if data.valid:
            valid = open_rows(data.valid, columns=names, base=folder, split="validation")
            require_columns(valid, wanted, hint)
            return rows, valid
        if not data.valid_fraction:
            return rows, None
        if self.task.reads_text and self.document != "row":
            hint = "name a validation set: data.valid"
            raise UsageError(
                f"data.valid_fraction would tear documents apart: data.document is {self.document!r}", hint
            )
        if isinstance(rows, Stream):
            raise UsageError("data.valid_fraction cannot split a stream", "name a validation set: data.valid")
        return _split(rows, data.valid_fraction, self.recipe.seed)


def _check_texts(targets: list[Any]) -> None:
    """Check what a language model is to say."""
    for row, target in enumerate(targets):
        try:
            target_texts(target)
        except InputError as error:
            error.row = row
            raise


def _inputs(recipe: Recipe, task: Task, folder: Path | None) -> dict[str, str]:
    """Modality to column; a modality named like a column, or as the task usually names it, needs no entry."""
    given = dict(recipe.data.inputs)
    if task.converses and not recipe.data.target:
        column = talk_column(given, "messages")
        media = [m for m in given if m != "messages"] if recipe.model.base else recipe.model.encoders
        return dict.fromkeys([*media, "text"], column)
    if recipe.model.base:  # its encoders' tables only say what to freeze
        return given if "text" in given or not task.reads_text else given | {"text": "text"}
    usual = {m: c if isinstance(c, str) else "+".join(c) for m, c in task.inputs.items()}
    modalities = list(recipe.model.encoders) or ([] if task.reads_text else list(given) or list(usual))
    reads_text = task.reads_text or ("text" in {*given, *usual} and reads_text_itself(task, recipe.model, folder))
    modalities += ["text"] if reads_text and "text" not in modalities else []
    extra = [m for m in given if m not in modalities]
    if extra:
        raise UsageError(f"data.inputs feeds {extra[0]!r}, but the model has no such encoder", "remove it")
    return {m: given.get(m) or usual.get(m, m) for m in modalities}


def _split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    order = epoch_order(len(rows), seed, -1)
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise UsageError(f"data.valid_fraction = {fraction} leaves no training rows of {len(rows)}", "lower it")
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))


def with_base_columns(recipe: Recipe, out: Path, folder: Path | None, *, resume: bool) -> Recipe:
    """Fill in the columns that a recipe with `model.base` does not name, and what a document is: as the base has them.

    A resumed run has them in its own recipe.toml, and needs the base no more. A document is a row where nothing else is
    known, and of a stream always where the recipe does not say.
    """
    data, stored = recipe.data, out / "recipe.toml"
    reads_text = find_task(recipe.task).reads_text
    if not recipe.model.base or (data.inputs and data.target):
        return replace(recipe, {"data": replace(data, {"document": data.document or "row"})}) if reads_text else recipe
    talks = find_task(recipe.task).converses and not data.target
    known: Any
    if resume and stored.exists():
        known = read_recipe(stored).data
        inputs = known.inputs
        encoders = [m for m in inputs if m not in ("messages", "text")]
    else:
        known, encoders = _of_base(local_name(recipe.model.base, folder))
        inputs = dict(known.inputs) or {m: m for m in encoders}
    if talks:
        column = talk_column(data.inputs, (not known.target and known.inputs.get("text")) or "messages")
        inputs, known = dict.fromkeys([*encoders, "text"], column), replace(known, {"target": ""})
        data = replace(data, {"inputs": {}})
    names = known.columns if not (data.inputs or data.target or data.columns) else data.columns
    changes = {"inputs": data.inputs or inputs, "target": data.target or known.target, "columns": names}
    if reads_text:
        changes["document"] = data.document or ("" if wants_stream(data) else known.document) or "row"
    return replace(recipe, {"data": replace(data, changes)})


def _of_base(name: str) -> tuple[DataRecord, list[str]]:
    """The columns of a published model, and its encoders' modalities."""
    path = pull(name)
    if not is_checkpoint(path):  # another library's
        return DataRecord(), list(load(name).encoders)
    config = read_config(path)
    return config.data, [role.removesuffix("_encoder") for role in config.components if role.endswith("_encoder")]


def resolved(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe with data paths made absolute, so that the copy in the run folder can be run again."""
    data = recipe.data
    changes: dict[str, Any] = {key: _absolute(getattr(data, key), folder) for key in ("train", "valid", "noise")}
    changes["mix"] = [replace(part, {"source": _absolute(part.source, folder)}) for part in data.mix]
    return replace(recipe, {"data": replace(data, changes)})


def _absolute(source: Any, folder: Path | None) -> Any:
    if isinstance(source, dict):
        return {key: _absolute(value, folder) for key, value in source.items()}
    if isinstance(source, list):
        return [_absolute(value, folder) for value in source]
    for base in (folder, Path.cwd()):
        if base is not None and source and (base / source).exists():
            return str((base / source).resolve())
    for base in (folder, Path.cwd()):  # a pattern
        if base is not None and source and any(glob.glob(str(base / name)) for name in expand_braces(source)):
            return str(base.resolve() / source)
    return source


def replace(struct: Any, changes: Mapping[str, Any]) -> Any:
    """Return a copy of a recipe's table with other values."""
    return msgspec.structs.replace(struct, **changes)
