"""From rows to batches on the device: decode, pack and copy, deterministically by seed and row, whatever the workers.

Which rows make a batch is decided in `mmhub.data.plan`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmhub.batch import Batch, Encoded
from mmhub.conversation import media_of, pack_scripts
from mmhub.data.cells import cell
from mmhub.data.inputs import is_conversation as is_conversation
from mmhub.data.inputs import usable as usable
from mmhub.data.talks import EmptyRow, NothingLeft, ReadTalks, Talk, TalkReader
from mmhub.data.talks import read_talk as read_talk
from mmhub.errors import InputError, MmhubError
from mmhub.interfaces import Decoder, Policy
from mmhub.interfaces.labels import is_missing

Numbered: TypeAlias = "int | tuple[int, Mapping[str, Any]]"  # a row by its number, or with its content

_POLL = 5  # seconds between looks at whether the decoding processes are alive
_GRACE = 10  # seconds for which a decoding process outlives SIGTERM
_PATIENCE = 900  # seconds without a batch after which they are taken to hang


@dataclass
class Loaded:
    """What a worker returns: a batch, or the error that stops the run; errors of skipped rows as text."""

    batch: Batch | None = None
    error: InputError | None = None
    skipped: list[str] = field(default_factory=list)

    def pin_memory(self) -> Loaded:
        return replace(self, batch=self.batch.pin_memory() if self.batch else None)


class _Indexed(Dataset[tuple[int, Mapping[str, Any]]]):
    def __init__(self, rows: Any, columns: Sequence[str] | None) -> None:
        self.rows, self.columns = rows, columns

    def __getitem__(self, index: Numbered) -> tuple[int, Mapping[str, Any]]:
        if not isinstance(index, int):
            return index
        if self.columns is None:
            return index, self.rows[index]
        row = self.rows.select([index])
        return index, {name: next(iter(row.column(name))) for name in self.columns}


@dataclass(frozen=True)
class ReadItems:
    """What a processor has read from the rows of a table, so that no row is read twice; flat, to be shared by workers.

    `numbers` are all items back to back; item k ends at `ends[k]`, and the items of row i at `items[i]`.
    """

    numbers: NDArray[np.int32]
    ends: NDArray[np.int64]
    items: NDArray[np.int64]
    known: NDArray[np.bool_]  # False for a row that could not be read, or that did not fit into memory

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in (self.numbers, self.ends, self.items, self.known))

    def row(self, number: int) -> list[Tensor] | None:
        """Return the items of a row as `Processor.read_row` does, None if they are not known."""
        if not self.known[number]:
            return None
        first, last = (int(self.items[number - 1]) if number else 0), int(self.items[number])
        starts = [int(self.ends[k - 1]) if k else 0 for k in range(first, last + 1)]
        return [torch.from_numpy(self.numbers[a:b].astype(np.int64)) for a, b in pairwise(starts)]


class Kept(Protocol):
    """The features of one modality, computed before and kept by row; `mmhub.engine.features` has them."""

    def has(self, row: int) -> bool:
        """Say whether the row has an input, readable or not."""

    def take(self, rows: Sequence[int]) -> Encoded:
        """Return the features of these rows.

        Raises:
            InputError: one was unreadable; `row` is its position in `rows`.
        """


@dataclass
class Collate:
    """Turn table rows into a batch.

    `seed` switches training-time augmentation on; it and the row number alone decide what happens to a row. `read`
    holds by modality what is read already (see `mmhub.data.lengths`), of a decoder of pairs in two items a pair. Rows
    that are `measured` need targets that answers can be compared with, and no more.
    """

    rows: Any  # Rows, or another source with its `folder` and `where`
    processors: Mapping[str, Any]
    inputs: Mapping[str, str]  # modality -> column
    decoder: Decoder | None = None
    target: str = ""
    policy: Policy = field(default_factory=Policy)
    skip: bool = False
    seed: int | None = None
    features: Mapping[str, Kept] = field(default_factory=dict)  # of frozen encoders; these need no processor
    read: Mapping[str, ReadItems] = field(default_factory=dict)
    measured: bool = False
    talks: TalkReader | None = None  # of a decoder that answers conversations
    scripts: ReadTalks | None = None  # what it has read already

    @property
    def columns(self) -> list[str] | None:
        """The columns that are read, None for all: those of kept features may be large, and are not."""
        if not self.features or self.talks is not None:
            return None
        read = [column for modality, column in self.inputs.items() if modality not in self.features]
        return list(dict.fromkeys([*read, *([self.target] if self.target else [])]))

    def __call__(self, samples: Sequence[tuple[int, Mapping[str, Any]]]) -> Loaded:
        kept = list(samples)
        skipped: list[str] = []
        while kept:
            try:
                return Loaded(self._batch(kept), skipped=skipped)
            except InputError as error:
                if error.row is None or not (self.skip or isinstance(error, NothingLeft)):
                    return Loaded(error=self.explain(error, kept), skipped=skipped)
                skipped.append(str(self.explain(error, kept)))
                del kept[error.row]
        return Loaded(skipped=skipped)

    def _batch(self, samples: Sequence[tuple[int, Mapping[str, Any]]]) -> Batch:
        if self.talks is not None:
            return self._talks(samples, self.talks)
        raw = {modality: self._raw(modality, column, samples) for modality, column in self.inputs.items()}
        for position in range(len(samples)):
            if all(values[position] is None for values in raw.values()):
                raise EmptyRow(f"none of {', '.join(self.inputs.values())} is given", position)
        seeds = None if self.seed is None else [row_seed(self.seed, i) for i, _ in samples]
        batch = Batch(items={}, size=len(samples), index=[i for i, _ in samples])
        for name, values in raw.items():
            if name in self.features:
                batch.features[name] = self.features[name].take(batch.index)
            else:
                batch.items[name] = self.processors[name](values, self.policy, seeds, self._known(name, batch.index))
        decoder: Any = self.decoder
        if decoder is not None and decoder.points:
            batch.raw = [{name: values[row] for name, values in raw.items()} for row in range(len(samples))]
        if decoder is not None and decoder.reads_text:
            batch.targets = decoder.count_targets(batch.items["text"])
        elif decoder is not None and decoder.paired:
            groups = batch.raw_targets = [self._group(number, row) for number, row in samples]
            known = [group if _has_pair(raw, i) else None for i, group in enumerate(groups)]
            batch.targets = decoder.encode_targets(known)
        elif decoder is not None and self.target:
            batch.raw_targets = [row.get(self.target) for _, row in samples]
            batch.targets = self._targets(batch)
        batch.weights = decoder.weigh(batch.targets) if batch.targets is not None else None
        return batch

    def _talks(self, samples: Sequence[tuple[int, Mapping[str, Any]]], reader: TalkReader) -> Batch:
        """A batch of conversations with their answers."""
        decoder: Any = self.decoder
        batch = Batch(items={}, size=len(samples), index=[i for i, _ in samples])
        talks = []
        for position, (number, row) in enumerate(samples):
            known = None if self.scripts is None else self.scripts.row(number)
            try:
                talks.append(reader.read(row, self.rows.folder(number), known))
            except InputError as error:
                error.row = position
                raise
        batch.shortened = sum(talk.left_out > 0 for talk in talks)
        batch.raw_targets = [talk.references for talk in talks]
        batch.raw = [{"text": talk.asks} for talk in talks]  # for subsets: what is laid out always holds some text
        seeds = None if self.seed is None else [row_seed(self.seed, i) for i, _ in samples]
        for name in reader.media:
            if name in self.features:
                batch.features[name] = _still_there(self.features[name].take(batch.index), name, talks)
            else:
                values = [media_of(talk.messages, name) or None for talk in talks]
                batch.items[name] = self.processors[name](values, self.policy, seeds)
        batch.items["text"], batch.plan, batch.prompts = pack_scripts([talk.script for talk in talks], reader.media)
        batch.targets = decoder.count_targets(batch.items["text"])
        batch.weights = decoder.weigh(batch.targets)
        return batch

    def _group(self, number: int, row: Mapping[str, Any]) -> Any:
        """What the rows that belong together have in common; a row without it is alone."""
        group = row.get(self.target) if self.target else number
        return f"row {number}" if is_missing(group) else group

    def _targets(self, batch: Batch) -> Any:
        """Encode the targets; of a decoder that points into its input, beside that."""
        decoder: Any = self.decoder
        if hasattr(decoder, "encode_pointed"):
            return decoder.encode_pointed(batch.raw_targets, batch.raw, self.processors)
        return (decoder.encode_references if self.measured else decoder.encode_targets)(batch.raw_targets)

    def _raw(self, modality: str, column: str, samples: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Any]:
        """One raw input a row, None where there is none; of features that are kept, whether there are any."""
        kept, alone = self.features.get(modality), len(self.inputs) == 1
        if kept is not None:
            return [True if kept.has(i) else None for i, _ in samples]
        values = [usable(modality, cell(row, column), self.rows.folder(i), alone) for i, row in samples]
        return [_sides(value, row) for row, value in enumerate(values)] if self._in_pairs(alone) else values

    def _in_pairs(self, alone: bool) -> bool:
        return alone and self.decoder is not None and self.decoder.paired

    def _known(self, modality: str, numbers: Sequence[int]) -> list[list[Tensor] | None] | None:
        known = self.read.get(modality)
        return None if known is None else [known.row(number) for number in numbers]

    def explain(self, error: InputError, samples: Sequence[tuple[int, Any]]) -> InputError:
        """Say where the row of an error is, and what can be done; `error.row` is its position in `samples`."""
        if error.row is None:
            return error
        column = "" if isinstance(error, EmptyRow) else self.inputs.get(error.modality or "", self.target)
        place = self.rows.where(samples[error.row][0]) + (f", column '{column}'" if column else "")
        hint = error.hint or ('fix the row, or set data.on_error = "skip"' if not self.skip else None)
        return InputError(f"{place}: {error.message}", hint)


def _still_there(kept: Encoded, name: str, talks: Sequence[Talk]) -> Encoded:
    """The features of those items that stand in conversations out of which turns were left."""
    if all(talk.items is None for talk in talks):
        return kept
    firsts = torch.searchsorted(kept.rows, torch.arange(len(talks) + 1)).tolist()
    numbers = [
        first + number
        for talk, first, end in zip(talks, firsts, firsts[1:], strict=False)
        for number in (range(end - first) if talk.items is None else talk.items[name])
    ]
    index = torch.tensor(numbers, dtype=torch.long)
    return Encoded(kept.features.select(index), kept.rows[index])


def two_items(value: Any) -> Any:
    """Return a pair of texts as a decoder of pairs reads it, as two items; anything else as it is."""
    return [value["text"], value["text_pair"]] if isinstance(value, Mapping) and "text_pair" in value else value


def _sides(value: Any, row: int) -> Any:
    """Two inputs of one modality that belong together, as two items of a row."""
    value = two_items(value)
    if isinstance(value, (list, tuple)) and len(value) > 2:
        error = InputError(f"a pair is two inputs, got {len(value)}", 'name two columns, such as "question+answer"')
        error.row = row
        raise error
    return value


def _has_pair(raw: Mapping[str, Sequence[Any]], row: int) -> bool:
    """Does a row have both sides: an input of every modality, or two of the only one?"""
    if len(raw) > 1:
        return all(values[row] is not None for values in raw.values())
    (values,) = raw.values()
    return isinstance(values[row], (list, tuple)) and len(values[row]) == 2


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
    collate: Collate, order: Iterable[Sequence[Numbered]], workers: int = 0, pin_memory: bool = False
) -> Iterator[Loaded]:
    """Yield what `collate` makes of each list of rows, in order, decoding in `workers` processes.

    A row is given by its number, or as a pair of number and content where only this process can read it.

    Raises:
        MmhubError: a decoding process was killed, or none of them answers.
    """
    loader = DataLoader(
        _Indexed(collate.rows, collate.columns),
        batch_sampler=order,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=_POLL if workers else 0,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # the loader draws a seed, which must not come from the run's random state
    )
    with _own_child_handler():
        batches = iter(loader)
    waited = 0
    while True:
        problem = None
        try:
            part = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            waited += _POLL
            problem = _worker_problem(error, waited)
            if problem is error:
                raise
        else:
            waited = 0
            yield part
        if problem is not None:
            raise problem


def _begin_worker(number: int) -> None:
    """Leave Ctrl-C to the main process, which finishes its step and saves: the batches for that come from here.

    SIGTERM, which a cluster sends to all processes at once, is obeyed after the time that saving takes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    with suppress(OSError, AttributeError):  # a group of its own: a terminal and `timeout` stop whole groups
        os.setpgid(0, 0)


@contextmanager
def _own_child_handler() -> Iterator[None]:
    """Undo the signal handler with which torch raises in the middle of anything when a worker dies.

    It might be the optimizer or a checkpoint that is torn; `load_batches` finds out within `_POLL` seconds as well.
    """
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if main else None
    yield
    if main and before is not None:
        signal.signal(signal.SIGCHLD, before)


def _worker_problem(error: RuntimeError, waited: int) -> Exception | None:
    """Return what to raise for an error of the loader, None to wait longer."""
    text = str(error)
    if text.startswith("DataLoader worker (pid"):
        hint = "if it was killed for want of memory, lower data.workers or the batch size"
        return MmhubError("a process that decodes the data was killed or crashed", hint)
    if not text.startswith("DataLoader timed out"):
        return error
    hint = "see whether a file or address answers; data.workers = 0 decodes in the main process"
    return MmhubError(f"no batch was decoded for {waited} seconds", hint) if waited >= _PATIENCE else None


class Copier(Protocol):
    """How batches get to a device: `begin` starts a copy, `ready` lets what follows use it."""

    def begin(self, part: Loaded) -> Any: ...

    def ready(self, begun: Any) -> Loaded: ...


def on_device(loaded: Iterable[Loaded], device: torch.device, copier: Copier | None = None) -> Iterator[Loaded]:
    """Yield batches on `device`. On a GPU the next one is copied on a stream of its own while this one is computed."""
    if copier is None and device.type == "cuda":
        copier = SideStream(device)
    if copier is None:
        yield from (_moved(part, device) for part in loaded)
        return
    ahead = None
    for part in loaded:
        begun = copier.begin(part)
        if ahead is not None:
            yield copier.ready(ahead)
        ahead = begun
    if ahead is not None:
        yield copier.ready(ahead)


class SideStream:
    """Copies from pinned memory on a CUDA stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def begin(self, part: Loaded) -> tuple[Loaded, Any]:
        with torch.cuda.stream(self.stream):
            return _moved(part, self.device), self.stream.record_event()

    def ready(self, begun: tuple[Loaded, Any]) -> Loaded:
        part, copied = begun
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(copied)
        for tensor in _tensors(part.batch):
            tensor.record_stream(computing)  # or its memory might be given away while it is still read
        return part


def _moved(part: Loaded, device: torch.device) -> Loaded:
    return replace(part, batch=part.batch.to(device, non_blocking=device.type == "cuda") if part.batch else None)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a batch, whatever holds them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for part in value.values() for tensor in _tensors(part))
    elif hasattr(value, "__dataclass_fields__"):
        yield from (tensor for part in vars(value).values() for tensor in _tensors(part))


def worker_count(choice: int | str, device: torch.device) -> int:
    """'auto' decodes in worker processes only beside a GPU: on a CPU they would take the cores from training.

    The cores of a machine are shared among the processes that train on it.
    """
    if choice != "auto":
        return int(choice)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    share = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(8, max(1, share - 1)) if device.type == "cuda" else 0
