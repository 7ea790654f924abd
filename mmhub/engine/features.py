"""Features of frozen encoders, computed once and read from disk in every epoch.

A set holds what one encoder makes of one column: its items' tokens end to end, or one vector an item where fusion and
decoder read no more than that, in safetensors shards. Here sets are made; `mmhub.engine.feature_key` says which set
belongs to what, `mmhub.engine.feature_store` reads them, `mmhub.feature_cache` knows where they are and for how long.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmhub.batch import Items
from mmhub.data.loader import load_batches, usable, worker_count
from mmhub.data.sources import Rows
from mmhub.engine.feature_key import Unknowable, feature_key, read_cells
from mmhub.engine.feature_store import FeatureStore
from mmhub.engine.ranks import Ranks
from mmhub.errors import InputError, TrustError
from mmhub.feature_cache import FORMAT, MANIFEST, features_folder, make_room, new_set
from mmhub.files import sha256
from mmhub.interfaces import Policy
from mmhub.layers import masked_mean
from mmhub.model import Model
from mmhub.weights import write_tensors

SHARD_BYTES = 64 * 2**20
SPARE_BYTES = 10**9  # of the disk stay free
_PROBES = 5  # batches of different lengths from which the size of all is estimated
_PLAN = "plan.json"


def show_progress(parts: Iterator[Any], total: int) -> Iterator[Any]:
    """Show on a terminal how many batches of features are done."""
    hidden = not sys.stderr.isatty()
    yield from tqdm(parts, total=total, desc="computing features", unit="batch", leave=False, disable=hidden)


def open_features(
    model: Model,
    rows: Rows,
    inputs: Mapping[str, str],
    *,
    policy: Policy | None = None,
    skip: bool = False,
    training: bool = True,
    precision: torch.dtype = torch.float32,
    limit_gb: float = 20.0,
    batch_size: int = 64,
    workers: int | str = "auto",
    ranks: Ranks | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = show_progress,
) -> dict[str, FeatureStore]:
    """Return the features of `rows` for each frozen encoder of `model`, computing those that are not on disk yet.

    Call it on every process, before the model is wrapped for several. An encoder that cannot be cached is not in the
    result, and `say` is told why. `training` rows are augmented, and others are not. With `skip`, unreadable rows stay
    unreadable. The processes that see the same cache folder share the work, and the first one shows its `progress`.

    Raises:
        InputError: a row is unreadable, unless `skip`.
    """
    found = {}
    for name in (name for name in model.modalities if name in model.frozen and name in inputs):
        if training and model.processors[name].augments:
            say(f'{name} is augmented: its frozen encoder runs every epoch; set augment = "none" to compute it once')
            continue
        work = _Work(
            model=model,
            name=name,
            rows=rows,
            column=inputs[name],
            alone=len(inputs) == 1,
            policy=policy or Policy(),
            skip=skip,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            summary=_reads_summary(model, name),
            limit=int(limit_gb * 1e9),
            ranks=ranks or Ranks(device=model.device),
            say=say,
            progress=progress,
        )
        try:
            found[name] = work.open()
        except _Off as reason:
            say(f"{name}: {reason}; its frozen encoder runs every epoch")
    return found


class _Off(Exception):
    """Features cannot be kept; the message says why."""


def _reads_summary(model: Model, name: str) -> bool:
    """Say whether nobody reads more than one vector an item of this modality."""
    if model.fusion.reads == "tokens":
        return False
    return name not in model.fusion.outputs or model.decoder.reads == "summary"


@dataclass
class _Part:
    """What the encoder made of one batch, on the CPU: N items, their T tokens together, and what was unreadable."""

    rows: Tensor  # (N,) long, in the data set
    lengths: Tensor  # (N,) long
    tokens: Tensor | None = None  # (T, D)
    pooled: Tensor | None = None  # (N, P)
    unreadable: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {"rows": self.rows, "lengths": self.lengths, "tokens": self.tokens, "pooled": self.pooled}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class _Work:
    """The features of one modality: looked up, or computed."""

    model: Model
    name: str
    rows: Rows
    column: str
    alone: bool
    policy: Policy
    skip: bool
    precision: torch.dtype
    batch_size: int
    workers: int | str
    limit: int
    ranks: Ranks
    say: Callable[[str], None]
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None
    summary: bool = False
    batches: list[list[int]] = field(default_factory=list)
    known: dict[int, _Part] = field(default_factory=dict)  # batches that were computed to see how large they are

    def open(self) -> FeatureStore:
        """Return the features. All processes come to the same end, or those that go on would wait for the others.

        Raises:
            _Off: they cannot be kept. InputError: a row is unreadable.
        """
        store, path, problem = None, Path(), ""
        leaders = _leaders(self.ranks)
        leader = leaders[self.ranks.rank]
        if self.ranks.rank == leader:
            try:
                path = self._plan()
                store = self._stored(path)
                if store is None:
                    self._check_space()
            except _Off as reason:
                problem = str(reason)
            except OSError as error:
                problem = f"its features cannot be kept ({error.strerror})"
        states = self.ranks.gather([problem, store is not None, str(path)])
        _agree(state[0] for state in states)
        path = Path(states[leader][2])
        if not all(states[first][1] for first in leaders):  # where only some machines have it, all do the same work
            self.say(f"{self.name}: computing the features of its frozen encoder once, for {len(self.rows)} rows")
            self._compute(path, leaders)
            store = None
        store = store or self._opened(path)
        _agree(self.ranks.gather("" if store else "another run has removed its features"))
        assert store is not None
        make_room(0, self.limit)
        self.say(f"{self.name}: the features of its frozen encoder take {store.bytes / 1e6:,.1f} MB")
        return store

    # -- before --

    def _plan(self) -> Path:
        """Cut the rows into batches of like length, the longest first; return the folder the features belong in."""
        try:
            cells = read_cells(self.rows, self.name, self.column, self.model.processors[self.name], alone=self.alone)
        except Unknowable as reason:
            raise _Off(str(reason)) from None
        self.summary &= not cells.several or self.model.encoders[self.name].pooled_dim is not None
        lengths = cells.lengths
        order = sorted((i for i, length in enumerate(lengths) if length >= 0), key=lambda i: (-lengths[i], i))
        self.batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        how = {"precision": self.precision, "batch_size": self.batch_size, "summary": self.summary}
        return features_folder() / feature_key(self.model, self.name, cells, policy=self.policy, **how)

    def _stored(self, path: Path) -> FeatureStore | None:
        if not path.exists():
            return None
        try:
            store = FeatureStore(path, check=True)
        except TrustError as error:
            self.say(f"{self.name}: {error.message}; its features are computed again")
            return None
        again = [[int(row)] for row in store.unreadable] if self.policy.urls else []  # a server may be back
        return None if any(len(part.unreadable) == 0 for part in self._parts(again)) else store

    def _opened(self, path: Path) -> FeatureStore | None:
        """Open a set that was there a moment ago."""
        try:
            return FeatureStore(path)
        except TrustError:
            return None

    def _check_space(self) -> None:
        """Estimate the size from a few batches, and remove what was not used for the longest time."""
        count = len(self.batches)
        numbers = sorted({(2 * i + 1) * count // (2 * _PROBES) for i in range(_PROBES)}) if count else []
        probes = dict(zip(numbers, self._parts([self.batches[n] for n in numbers]), strict=True))
        found = sum(part.bytes for part in probes.values())
        tried = sum(len(self.batches[n]) for n in numbers)
        needed = found * sum(map(len, self.batches)) // max(tried, 1)
        self.known = probes if found <= SHARD_BYTES else {}
        folder = features_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _Off(f"'{folder}' cannot be made ({error.strerror})") from None
        if not make_room(needed, self.limit):
            raise _Off(f"its features would take {_gb(needed)} of train.cache_gb = {_gb(self.limit)}")
        free = shutil.disk_usage(folder).free
        if needed + SPARE_BYTES > free:
            raise _Off(f"its features would take {_gb(needed)}, and the disk has {_gb(free)} left")

    # -- computing --

    def _compute(self, path: Path, leaders: Sequence[int]) -> None:
        """Compute a set, each process that has this cache folder a share of it, and put it in place."""
        leader, problem = leaders[self.ranks.rank], ""
        try:
            with ExitStack() as stack:
                aside, failed = self._begin(stack, path) if self.ranks.rank == leader else (None, "")
                states = self.ranks.gather([failed, str(aside)])
                _agree(state[0] for state in states)
                mates = [rank for rank, first in enumerate(leaders) if first == leader]
                shares = self.ranks.gather(self._share(Path(states[leader][1]), mates))
                _agree(share["problem"] for share in shares)
                self._refuse(next((share["error"] for share in shares if share["error"]), None))
                if aside is not None:
                    mine = [share for share, owner in zip(shares, leaders, strict=True) if owner == leader]
                    self._write_manifest(aside, mine)
        except OSError as error:  # of the last lines and of putting the set in place, where nobody waits for anybody
            problem = _unwritable(error)
        _agree(self.ranks.gather(problem))

    def _begin(self, stack: ExitStack, path: Path) -> tuple[Path | None, str]:
        """Make the folder in which a set grows, with the plan in it; return it, and why that went wrong."""
        try:
            aside = stack.enter_context(new_set(path))
            (aside / _PLAN).write_text(json.dumps({"summary": self.summary, "batches": self.batches}))
        except OSError as error:
            return None, _unwritable(error)
        return aside, ""

    def _share(self, folder: Path, mates: Sequence[int]) -> dict[str, Any]:
        """Compute and write this one's share of the batches; return shards, unreadable rows, and what went wrong."""
        share: dict[str, Any] = {"shards": [], "unreadable": {}, "problem": "", "error": None}
        writer = _Writer(folder, f"{self.ranks.rank:03}", self.limit // len(mates))
        try:
            plan = json.loads((folder / _PLAN).read_bytes())
            self.summary, self.batches = plan["summary"], plan["batches"]
            numbers = range(mates.index(self.ranks.rank), len(self.batches), len(mates))
            parts = self._numbered(numbers)
            shown = self.progress if self.ranks.first else None
            for part in shown(parts, len(numbers)) if shown else parts:
                share["unreadable"] |= part.unreadable
                if part.unreadable and not self.skip:
                    share["error"] = next([int(row), *problem] for row, problem in part.unreadable.items())
                    return share
                writer.add(part)
            share["shards"] = writer.close()
        except _Off as reason:
            share["problem"] = str(reason)
        except OSError as error:
            share["problem"] = _unwritable(error)
        return share

    def _numbered(self, numbers: Sequence[int]) -> Iterator[_Part]:
        fresh = self._parts([self.batches[n] for n in numbers if n not in self.known])
        for number in numbers:
            yield self.known.pop(number) if number in self.known else next(fresh)

    def _parts(self, batches: Sequence[Sequence[int]]) -> Iterator[_Part]:
        """Read and encode batches of rows."""
        if not batches:
            return
        cells = _Cells(self.rows, self.name, self.column, self.alone)
        read: Any = _Read(cells, self.model.processors[self.name], self.policy)
        loaded: Any = load_batches(read, batches, worker_count(self.workers, self.model.device))
        for items, rows, unreadable in loaded:
            part = self._encode(items) if len(items) else _Part(items.rows, items.rows)
            part.rows, part.unreadable = torch.tensor(rows, dtype=torch.long)[items.rows], unreadable
            yield part

    @torch.no_grad()
    def _encode(self, items: Items) -> _Part:
        device = self.model.device
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            features = self.model.encode_items(self.name, items.to(device))
        if features.ids is not None or features.loss is not None:
            raise _Off("its encoder says more of its tokens than can be kept")
        lengths, pooled, tokens = features.lengths, features.pooled, None
        if not self.summary:
            tokens = features.tokens[features.mask].cpu()
        else:
            if pooled is None:
                tokens = masked_mean(features.tokens, features.mask)[lengths > 0].cpu()
            lengths = (lengths > 0).long()
        return _Part(items.rows, lengths.cpu(), tokens, None if pooled is None else pooled.cpu())

    def _refuse(self, error: Sequence[Any] | None) -> None:
        """Stop as training itself would at this row."""
        if error is not None:
            row, message, hint = error
            place = f"{self.rows.where(row)}, column '{self.column}'"
            raise InputError(f"{place}: {message}", hint or 'fix the row, or set data.on_error = "skip"')

    def _write_manifest(self, folder: Path, shares: Sequence[Mapping[str, Any]]) -> None:
        (folder / _PLAN).unlink()
        facts = {
            "format": FORMAT,
            "modality": self.name,
            "encoder": self.model.sources[f"{self.name}_encoder"].id,
            "source": self.rows.source,
            "rows": len(self.rows),
            "dim": self.model.encoders[self.name].dim,
            "shards": [shard for share in shares for shard in share["shards"]],
            "unreadable": {row: problem for share in shares for row, problem in share["unreadable"].items()},
        }
        (folder / MANIFEST).write_text(json.dumps(facts))


def _leaders(ranks: Ranks) -> list[int]:
    """Return by rank who looks after the set it will read: the first of all, or the first on a machine of its own."""
    if not ranks.several:
        return [0]
    mark = features_folder() / f".mark-{os.urandom(8).hex()}"
    if ranks.first:
        with suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    shared = os.path.exists(ranks.tell(str(mark)))
    leaders: list[int] = ranks.gather(0 if shared else ranks.rank - ranks.local)
    if ranks.first:
        with suppress(OSError):  # a read-only file system says so even where there is nothing to remove
            mark.unlink()
    return leaders


def _agree(problems: Iterable[str]) -> None:
    """Give up where one process has to."""
    for problem in filter(None, problems):
        raise _Off(problem)


def _unwritable(error: OSError) -> str:
    return f"its features cannot be written ({error.strerror or error})"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


class _Writer:
    """Write parts as shards of about `SHARD_BYTES`."""

    def __init__(self, folder: Path, prefix: str, limit: int) -> None:
        self.folder, self.prefix, self.limit = folder, prefix, limit
        self.parts: list[_Part] = []
        self.shards: list[dict[str, Any]] = []

    def add(self, part: _Part) -> None:
        self.parts += [part] if len(part.rows) else []
        if sum(one.bytes for one in self.parts) >= SHARD_BYTES:
            self._flush()

    def close(self) -> list[dict[str, Any]]:
        """Write what is left; return file, bytes and sha256 of every shard."""
        if self.parts:
            self._flush()
        return self.shards

    def _flush(self) -> None:
        path = self.folder / f"{self.prefix}-{len(self.shards):05}.safetensors"
        tensors = [part.tensors for part in self.parts]
        write_tensors({name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}, path)
        self.shards.append({"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)})
        self.parts = []
        if sum(shard["bytes"] for shard in self.shards) > self.limit:
            raise _Off(f"its features take more than train.cache_gb = {_gb(self.limit)}")


@dataclass
class _Cells:
    """The raw inputs of one column by row number; no other column is touched."""

    rows: Rows
    modality: str
    column: str
    alone: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        cell = next(iter(self.rows.select([row]).column(self.column)))
        return usable(self.modality, cell, self.rows.folder(row), self.alone)


@dataclass
class _Read:
    """Turn raw inputs into items, their rows, and message and hint for those that are unreadable."""

    rows: _Cells
    processor: Any
    policy: Policy
    columns: None = None

    def __call__(self, cells: Sequence[tuple[int, Any]]) -> tuple[Items, list[int], dict[str, tuple[str, str | None]]]:
        read: list[Any] = []
        unreadable: dict[str, tuple[str, str | None]] = {}
        for row, value in cells:
            try:
                read.append(self.processor.read_row(value, self.policy))
            except InputError as error:
                unreadable[str(row)] = (error.message, error.hint)
                read.append([])
        return self.processor.pack_rows(read), [row for row, _ in cells], unreadable
