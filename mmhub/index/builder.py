"""Make an index or bring one up to date: only what is new or has changed passes through the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmhub.batch import Batch
from mmhub.data.cells import cell
from mmhub.data.loader import Loaded, batches_of, load_batches, on_device, usable, worker_count
from mmhub.errors import InputError, MmhubError, UsageError
from mmhub.hub.pull import load, resolve_name
from mmhub.index.listing import Listing, list_source
from mmhub.index.progress import Progress
from mmhub.index.store import (
    HEADER,
    VECTORS,
    Entry,
    Header,
    Index,
    Kind,
    Vectors,
    index_folder,
    read_header,
    write_index,
)
from mmhub.index.vectors import check_model, identity_of, usable_rows, vectors_of
from mmhub.interfaces import Policy
from mmhub.interfaces.raw import raw_bytes
from mmhub.model import Model


@dataclass(frozen=True)
class Built:
    """What a build did: how many entries are new, changed, gone or as they were, and (path, error) of the others."""

    index: Index
    added: int
    changed: int
    removed: int
    kept: int
    failed: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to build; none but `kind` changes what is found.

    `kind` None keeps that of the index there is, and is "exact" for a new one. `failed` is told (path, error) of each
    input that cannot be read, unless `stop`, which raises. `seconds` are those between two savings of the progress,
    `device` is where a model that is given by its name is loaded.
    """

    kind: Kind | None = None
    rebuild: bool = False
    batch_size: int = 32
    workers: int | str = "auto"
    stop: bool = False
    seconds: float = 20.0
    device: str = "cpu"
    policy: Policy = field(default_factory=Policy)
    failed: Callable[[str, str], None] | None = None
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None


def build(
    model: Model | str,
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    modality: str = "",
    column: str = "",
    options: Options | None = None,
) -> Index:
    """Index all files below a folder, or all rows of a table, that `model` reads; see `renew` for what it did.

    The index is kept in the folder, as `.mmhub-index`, beside a table, or in the folder `out`. `modality` says which
    kind of files is meant where there are several, `column` where in a table the inputs are.

    Raises:
        UsageError: the index there is one of another model (unless `options.rebuild`), or `out` is something else.
        InputError: nothing could be read. MmhubError: the disk is full; an older index is untouched.
    """
    return renew(model, source, out=out, modality=modality, column=column, options=options).index


def renew(
    model: Model | str,
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    modality: str = "",
    column: str = "",
    options: Options | None = None,
) -> Built:
    """Build as `build` does, and return what was done. An interrupted build goes on where it ended."""
    options = options or Options()
    root = Path(source)
    folder = index_folder(root) if out is None else Path(out)
    old = _old(folder, options)
    model = load(model, device=options.device) if isinstance(model, str) else model
    check_model(model)
    identity = identity_of(model)
    _check_same(old, folder, identity, _lasting_name(model), root)
    given = modality or (old.modality if old else ""), column or (old.column if old else "")
    listing = list_source(root, model.modalities, model.columns.inputs, *given)
    if old is not None and old.modality != listing.modality:
        hint = "build it anew with --rebuild, or another one with --out"
        raise UsageError(f"the index '{folder}' holds {old.modality}, not {listing.modality}", hint)
    aside = folder.with_name(folder.name + ".partial")
    progress = Progress(aside, identity, root, listing.modality, options.seconds)
    if options.rebuild:
        progress.clear()
    known = progress.read() | (_known(Index(folder, old)) if old else {})
    fresh, failed = _embed(model, listing, known, progress, options)
    known |= fresh
    entries = [entry for entry in listing.entries if entry.stamp in known]
    if not entries:
        raise InputError(f"none of the {len(failed)} {listing.modality} inputs of '{root}' could be read", "check them")
    header = Header(
        model=_lasting_name(model),
        identity=identity,
        modality=listing.modality,
        source=_way(folder, root, out is None),
        kind=options.kind or (old.kind if old else "exact"),
        dim=len(known[entries[0].stamp]),
        sha256=old.sha256 if old else "",
        column=listing.column if entries[0].row else "",
        entries=entries,
    )
    if header != old:
        header = write_index(folder, header, np.stack([known[entry.stamp] for entry in entries]))
    progress.clear()
    return _built(Index(folder, header, model), old, listing, failed)


def _old(folder: Path, options: Options) -> Header | None:
    """What the index there is says, None if there is none to go on from; nothing else may be overwritten."""
    if folder.exists():
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if not there <= {HEADER, VECTORS}:
            raise UsageError(f"'{folder}' exists and is no index", "name another folder with --out")
        if HEADER in there and not options.rebuild:
            return read_header(folder)
    return None


def _check_same(old: Header | None, folder: Path, identity: str, name: str, root: Path) -> None:
    """Raise UsageError if the index there is has other vectors, or is of another folder that is still there."""
    if old is None:
        return
    if old.identity != identity:
        what = f"another model, {old.model or 'without a name'}" if old.model != name else "other weights of that model"
        raise UsageError(f"the index '{folder}' was built with {what}", "build it anew with --rebuild")
    source = Index(folder, old).source
    if source.exists() and root.exists() and not source.samefile(root):
        hint = "build it anew with --rebuild, or another one with --out"
        raise UsageError(f"the index '{folder}' is of '{source}', not of '{root}'", hint)


def _known(index: Index) -> dict[str, Vectors]:
    return {entry.stamp: vector for entry, vector in zip(index.header.entries, index.vectors, strict=True)}


def _lasting_name(model: Model) -> str:
    """The model's name as it is understood from anywhere: local ones by their whole path."""
    try:
        resolved = resolve_name(model.name)
    except MmhubError:  # a model that was made here may be called anything
        return model.name
    component = f"#{resolved.component}" if resolved.component else ""
    return f"{resolved.path.resolve()}{component}" if resolved.path is not None else model.name


def _way(folder: Path, root: Path, beside: bool) -> str:
    """How to get from the index to what was indexed: side by side they may move together."""
    if beside:
        return ".." if root.is_dir() else f"../{root.name}"
    return str(root.resolve())


def _built(index: Index, old: Header | None, listing: Listing, failed: Sequence[tuple[str, str]]) -> Built:
    before = {entry.place: entry.stamp for entry in (old.entries if old else ())}
    now = index.header.entries
    kept = sum(before.get(entry.place) == entry.stamp for entry in now)
    added = sum(entry.place not in before for entry in now)
    removed = len(before.keys() - {entry.place for entry in listing.entries})
    return Built(index, added, len(now) - kept - added, removed, kept, failed)


# -- what is new, through the model ------------------------------------------------------------------------------------


@dataclass
class Read(Loaded):
    """A batch of what could be read, and (number, error) of what could not."""

    failed: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Reader:
    """Read and pack rows of one modality; each is read once, whatever becomes of the others."""

    listing: Listing
    processor: Any
    policy: Policy
    columns: None = None  # `load_batches` asks for all of them

    @property
    def rows(self) -> Any:
        return self.listing.rows

    def __call__(self, samples: Sequence[tuple[int, Mapping[str, Any]]]) -> Read:
        read, index, failed = [], [], []
        for number, row in samples:
            try:
                read.append(self.processor.read_row(self._raw(number, row), self.policy))
                index.append(number)
            except InputError as error:
                failed.append((number, error.message))
        if not read:
            return Read(failed=failed)
        items = {self.listing.modality: self.processor.pack_rows(read)}
        return Read(Batch(items=items, size=len(read), index=index), failed=failed)

    def _raw(self, number: int, row: Mapping[str, Any]) -> Any:
        raw = usable(self.listing.modality, cell(row, self.listing.column), self.rows.folder(number))
        if self.listing.modality != "text" or not isinstance(raw, os.PathLike):
            return raw
        try:
            return (raw_bytes(raw, self.policy) or b"").decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"'{raw}' is not UTF-8", "save it as UTF-8") from None


def _embed(
    model: Model, listing: Listing, known: Mapping[str, Any], progress: Progress, options: Options
) -> tuple[dict[str, Vectors], list[tuple[str, str]]]:
    """Return the vectors by stamp of entries that are not `known`, and (path, error) of those that have none."""
    pending = {n: e for n, e in zip(listing.numbers, listing.entries, strict=True) if e.stamp not in known}
    fresh: dict[str, Vectors] = {}
    failed: list[tuple[str, str]] = []
    was_training = model.training
    model.eval()
    try:
        for part in _load(model, listing, [*pending], options):
            bad = list(part.failed)
            if part.batch is not None:
                vectors = vectors_of(model, part.batch, listing.modality)
                good = usable_rows(vectors)
                bad += [(n, "it has no vector") for n, fine in zip(part.batch.index, good, strict=True) if not fine]
                stamps = [pending[n].stamp for n, fine in zip(part.batch.index, good, strict=True) if fine]
                fresh |= zip(stamps, vectors[good], strict=True)
                if stamps:
                    progress.add(stamps, vectors[good])
            failed += [_failure(pending[number], error, options) for number, error in bad]
    except BaseException:  # Ctrl-C, too: the next build goes on from here
        progress.write()
        raise
    finally:
        model.train(was_training)
    return fresh, failed


def _load(model: Model, listing: Listing, numbers: Sequence[int], options: Options) -> Iterator[Any]:
    reader: Any = Reader(listing, model.processors[listing.modality], options.policy)
    order = batches_of(numbers, options.batch_size)
    workers = worker_count(options.workers, model.device)
    loaded = load_batches(reader, order, workers, pin_memory=model.device.type == "cuda")
    parts = on_device(loaded, model.device)
    return options.progress(parts, len(order)) if options.progress else parts


def _failure(entry: Entry, error: str, options: Options) -> tuple[str, str]:
    path = f"{entry.path} row {entry.row}" if entry.row else entry.path
    if options.stop:
        raise InputError(f"{path}: {error}", "mend or remove it, or leave out --on-error stop")
    if options.failed is not None:
        options.failed(path, error)
    return path, error
