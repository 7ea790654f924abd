"""Answers to all rows of a table: windows are read, answered, and saved or collected."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
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

TOKENS = 4096  # of a batch, padding included, on a CPU; measured by benchmarks/batch_predict.py
_GPU_TOKENS = 32768
_RUN = 4  # batches in a run of rows that are answered together
_ANSWER_KEYS = (  # kept columns of these names are told apart from what was answered
    "row", "error", "label", "labels", "score", "scores", "value", "text", "texts", "finish", "truncated", "words",
    "segments", "tags", "start", "end", "refused", "guard", "vectors",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to answer a table; `batch_size`, `batch_tokens` and `workers` change no answer.

    Attributes:
        inputs: modality -> column. keep: columns that stand beside the answers. answers: how a model answers that
        writes or hears, `answers(samples, number of the first)`; None for its own batches. batch_size: rows, 0 for what
        suits the model. batch_tokens: padded tokens, 0 for what suits the device. skip: is a row that cannot be read
        answered {"error"}? Else it ends the job. of: what a job that is gone on with must have in common with this one.
        stop: is it time to stop? The number of the signal, or 0.
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


@dataclass(frozen=True)
class Done:
    """What came out: rows, how many of them could not be read, seconds, and the answers that no file took."""

    rows: int
    skipped: int
    seconds: float
    answers: Sequence[Answer] = ()


def predict_table(model: Any, table: Table, out: Path | None, options: Options) -> Done:
    """Answer all rows of a table, in order, into the file `out` or, without one, into memory.

    Raises:
        InputError: a row cannot be read, and `skip` is off. Interrupted: `stop` said so.
        UsageError: `out` is being written, or its parts are of something else. MmhubError: the disk is full.
    """
    begun = time.monotonic()
    was_training = model.training
    model.eval()
    try:
        if out is None:
            found = [
                answer for window in _answered(model, table, Place(), options) for answer in _kept(window, options)
            ]
            return Done(len(found), sum("error" in answer for answer in found), time.monotonic() - begun, found)
        with Job(out, dict(options.of) | {"data": table.marks()}, restart=options.restart) as job:
            _work(model, table, job, options)
            job.finish(partial(_join, suffix=out.suffix))
            return Done(job.rows, job.skipped, time.monotonic() - begun)
    finally:
        model.train(was_training)


def _work(model: Any, table: Table, job: Job, options: Options) -> None:
    """Answer what is left, and say where a stop left it."""
    if job.rows:
        options.say(f"going on after {job.rows:,} rows, which are in '{job.folder}'")
    try:
        for window in _answered(model, table, job.start, options):
            job.add(window, _kept(window, options))
    except MmhubError as error:
        if job.rows and not isinstance(error, UsageError):
            done = f"{job.rows:,} rows are kept in '{job.folder}': the same command goes on"
            error.hint = f"{error.hint}; {done}" if error.hint else done
        raise


def _answered(model: Any, table: Table, start: Place, options: Options) -> Iterator[Window]:
    """Yield windows once all their rows are answered."""
    failed = partial(_failed, table, options)
    step = _RUN * (options.batch_size or 32)
    how: Batches | Runs
    if options.answers is None or in_batches(model):
        tokens = options.batch_tokens or (TOKENS if model.device.type == "cpu" else _GPU_TOKENS)
        how = Batches(model, table, options.inputs, options.policy, failed, options.batch_size, tokens, options.workers)
        pace = Pace()
    else:
        how = Runs(model, table, options.inputs, options.answers, failed, step)
        pace = Pace(step, step)
    wanted = all_parts([*options.inputs.values(), *options.keep], table.columns)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(table.about, start.number, options.say, options.quiet))
        for window, rows in how.answer(windows(table.read(start, wanted), pace)):
            progress.add(rows)
            if all(answer is not None for answer in window.answers):
                yield window
                pace.tell(len(window.rows))
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
        hint = error.hint or "mend the row"
        raise InputError(at_row, f"{hint}; or go on without the row: --on-error skip")
    window.answers[place] = {"error": at_row}


def _kept(window: Window, options: Options) -> list[Answer]:
    """The answers, each with the cells that stand beside it."""
    found = window.done()
    if not options.keep:
        return found
    names = {name: f"input_{name}" if name in _ANSWER_KEYS else name for name in options.keep}
    cells = [{} if isinstance(row.cells, InputError) else row.cells for row in window.rows]
    return [
        {names[name]: _plain(own.get(name), name) for name in options.keep} | answer
        for own, answer in zip(cells, found, strict=True)
    ]


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
