"""Answers to all rows of a table: windows are read, answered, and saved or collected."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from mmhub.bulk.batches import Batches
from mmhub.bulk.formats import TABLES, write_answers
from mmhub.bulk.job import Job, copy_part, read_part
from mmhub.bulk.progress import Progress
from mmhub.bulk.rows import Place, Table
from mmhub.bulk.runs import Runs
from mmhub.bulk.windows import Answer, Pace, Window, windows
from mmhub.data.cells import all_parts
from mmhub.errors import InputError, Interrupted, MmhubError, UsageError
from mmhub.interfaces import Policy, TextDecoder

TOKENS = 1024  # of a batch, padding included, on a CPU; measured by benchmarks/batch_predict.py
_GPU_TOKENS = 32768
_RUN = 4  # batches in a run of rows that are answered together
_ANSWER_KEYS = (  # kept columns of these names are told apart from what was answered, in every row
    "row", "error", "label", "labels", "score", "scores", "value", "text", "texts", "finish", "truncated", "words",
    "segments", "tags", "entities", "start", "end", "refused", "guard", "vectors", "embeddings",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to answer a table; `batch_size`, `batch_tokens` and `workers` change no answer.

    Attributes:
        inputs: modality -> column. keep: columns that stand beside the answers. answers: how a model answers that
        writes or hears, `answers(samples, number of the first)`; None for its own batches. batch_size: rows, 0 for what
        suits the model. batch_tokens: padded tokens, 0 for what suits the device. skip: is a row that cannot be read
        answered {"error"}? Else it ends the job. of: what a job that is gone on with must have in common with this one.
        stop: is it time to stop? The number of the signal, or 0. listed: the number of rows up to which answers that
        stand in a file are returned, too.
    """

    inputs: Mapping[str, str]
    keep: Sequence[str] = ()
    answers: Callable[[list[Mapping[str, Any]], int], list[Answer]] | None = None
    batch_size: int = 0
    batch_tokens: int = 0
    workers: int = 0
    policy: Policy = field(default_factory=Policy)
    skip: bool = False
    of: Mapping[str, Any] = field(default_factory=dict)
    restart: bool = False
    stop: Callable[[], int] = int
    say: Callable[[str], None] = print
    quiet: bool = False
    listed: int = 0


@dataclass(frozen=True)
class Done:
    """What came out: rows, how many of them could not be read, seconds, and the answers, as `Options` say."""

    rows: int
    skipped: int
    seconds: float
    answers: Sequence[Answer] = ()


def predict_table(model: Any, table: Table, out: Path | None, options: Options) -> Done:
    """Answer all rows of a table, in order, into the file `out` or, without one, into memory.

    Raises:
        InputError: a row cannot be read, and `skip` is off. Interrupted: `stop` said so.
        UsageError: `out` is there or being written, or its parts are of something else. MmhubError: the disk is full.
    """
    begun = time.monotonic()
    _check_kept(table, options.keep)
    read = set(all_parts(options.inputs.values(), table.columns))
    table.others = {model.columns.inputs.get(name, name) for name in model.modalities} - read
    was_training = model.training
    model.eval()
    try:
        if out is None:
            with closing(_answered(model, table, Place(), options)) as answered:
                found = [answer for window in answered for answer in _kept(window, options)]
            return Done(len(found), sum("error" in answer for answer in found), time.monotonic() - begun, found)
        with Job(out, dict(options.of) | {"data": table.marks()}, restart=options.restart) as job:
            _work(model, table, job, options)
            found = list(job.answers()) if job.rows <= options.listed else []
            job.finish(partial(_join, suffix=out.suffix))
            return Done(job.rows, job.skipped, time.monotonic() - begun, found)
    finally:
        model.train(was_training)


def _work(model: Any, table: Table, job: Job, options: Options) -> None:
    """Answer what is left, and say where a stop left it."""
    if job.rows:
        options.say(f"going on after {job.rows:,} rows, which are in '{job.folder}'")
    try:
        with closing(_answered(model, table, job.start, options)) as answered:
            for window in answered:
                job.add(window, _kept(window, options))
    except MmhubError as error:
        if job.rows and not isinstance(error, UsageError):
            done = f"{job.rows:,} rows are kept in '{job.folder}': the same command goes on"
            if isinstance(error, InputError):  # it would fail again
                done = f"{job.rows:,} rows are kept in '{job.folder}'; a mended table begins anew, with --restart"
            error.hint = f"{error.hint}; {done}" if error.hint else done
        raise


def _answered(model: Any, table: Table, start: Place, options: Options) -> Generator[Window, None, None]:
    """Yield windows once all their rows are answered."""
    failed = partial(_failed, table, options)
    batch = options.batch_size or 32
    how: Batches | Runs
    if options.answers is None or in_batches(model):
        tokens = options.batch_tokens or (TOKENS if model.device.type == "cpu" else _GPU_TOKENS)
        how = Batches(model, table, options.inputs, options.policy, failed, options.batch_size, tokens, options.workers)
        pace = Pace()
    else:
        how = Runs(model, table, options.inputs, options.answers, failed, _RUN * batch)
        pace = Pace(batch, batch)
    wanted = all_parts([*options.inputs.values(), *options.keep], table.columns)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(table.about, start.number, options.say, options.quiet))
        answered = stack.enter_context(closing(how.answer(windows(table.read(start, wanted), pace))))
        for window, rows in answered:
            progress.add(rows)
            if all(answer is not None for answer in window.answers):
                yield window
                pace.tell(len(window.rows), window.size())
            if number := options.stop():
                raise Interrupted("stopped", None, 128 + number)


def in_batches(model: Any) -> bool:
    """Does the model answer a batch in one pass, with nobody looking at the samples?"""
    writes = isinstance(model.decoder, TextDecoder) or model.converses or model.task.name == "speech-recognition"
    return not writes and not model.has_guards


def _failed(table: Table, options: Options, window: Window, place: int, error: InputError) -> None:
    """Answer a row that cannot be read by saying why, or end the job."""
    row = window.rows[place]
    named = options.inputs.get(error.modality or "")
    column = f", column '{named}'" if named else ""
    at_row = (
        error.message if isinstance(row.cells, InputError) else f"{table.where(row.place)}{column}: {error.message}"
    )
    if not options.skip:
        without = "--on-error skip goes on without the row"
        raise InputError(at_row, f"{error.hint}; or {without}" if error.hint else without)
    window.answers[place] = {"error": at_row}


def _kept(window: Window, options: Options) -> list[Answer]:
    """The answers, each with the cells that stand beside it."""
    found = window.done()
    if not options.keep:
        return found
    cells = [{} if isinstance(row.cells, InputError) else row.cells for row in window.rows]
    return [_beside(own, answer, options.keep) for own, answer in zip(cells, found, strict=True)]


def _beside(own: Mapping[str, Any], answer: Answer, keep: Sequence[str]) -> Answer:
    """An answer with a row's cells before it, of names that are not the answer's."""
    found: Answer = {}
    for name in dict.fromkeys(keep):
        shown = f"input_{name}" if name in _ANSWER_KEYS or name in answer else name
        if shown in found or shown in answer:
            raise UsageError(f"two columns would be named {shown!r}", "keep one of them with --keep")
        found[shown] = _plain(own.get(name), name)
    return found | answer


def _check_kept(table: Table, keep: Sequence[str]) -> None:
    for name in keep:
        if name not in table.columns:
            there = ", ".join(map(repr, table.columns))
            raise UsageError(f"no column {name!r} to keep in '{table.source}', which has {there}", "name one of these")
    _beside({}, {}, keep)


def _plain(value: Any, column: str) -> Any:
    """A cell as JSON data; dates and decimals as text."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, column) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, column) for item in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise UsageError(
            f"column {column!r} holds bytes, which are not kept beside answers", "name another with --keep"
        )
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _join(file: IO[bytes], parts: Sequence[Path], suffix: str) -> None:
    if suffix.lower() in TABLES:
        write_answers(file, [partial(read_part, part) for part in parts], suffix)
        return
    for part in parts:
        copy_part(part, file)
