"""Resumable checkpoints: how far a run has come, its model and its optimizer, each step in a fresh folder.

    checkpoints/step-00000500/
      model/           config.json and processors' files; and the weights, where no tensor is sharded
      state.safetensors                                the optimizer's state, and averages of the weights
      rank-00000-of-00002.safetensors, .json           instead, where tensors are sharded: one process's pieces of all
      state.json       position, and what of the optimizer is no tensor
      manifest.json    size and sha256 of every file, written last
    checkpoints/last, checkpoints/best                 links

Only safetensors and JSON: torch.distributed.checkpoint keeps its index as pickle. There is no random state, for each
step is seeded by its own number. A folder without a valid manifest is not used. These folders are never published.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from mmhub.checkpoint import FileRecord, Structure, load_structure, structure_of, write_structure
from mmhub.engine.ranks import Ranks
from mmhub.engine.tensors import (
    MODEL,
    Box,
    Copied,
    Number,
    Stored,
    add_stored,
    copy_tensors,
    fill_averages,
    fill_carried,
    fill_model,
    fill_optimizer,
    gather_carried,
    materialize,
    parameter_names,
)
from mmhub.errors import MmhubError, TrustError
from mmhub.files import disk_errors, publish, sha256, sync, write_file
from mmhub.model import Model
from mmhub.weights import check_space, write_tensors

FORMAT = 2
_WHAT = "a training checkpoint"


class Position(msgspec.Struct):
    """How far a run has come. Steps are optimizer steps; `batches` counts those of the current epoch."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    best: float | None = None
    best_loss: float = 0.0
    best_step: int = 0
    evaluations_without_gain: int = 0
    skipped: int = 0
    shortened: int = 0  # conversations of a stream of which turns were left out, in all epochs
    seconds: float = 0.0
    loss_sum: float = 0.0  # since the last line in metrics.jsonl
    loss_steps: int = 0
    evaluated_step: int = -1
    lines: int = 0  # in metrics.jsonl
    rows: int = 0  # of the training data
    parents: list[dict[str, str]] = []  # what the weights started from
    stream: dict[str, Any] | None = None  # where streamed data goes on
    pieces: int = 1  # in which a batch is computed, with batch_size = "auto"
    fingerprint: str = ""  # of the training data


class _State(msgspec.Struct):
    """state.json."""

    position: Position
    trained: list[str]
    numbers: dict[str, dict[str, Number]] = {}


class _Shard(msgspec.Struct):
    """rank-….json: what one process wrote, and that it has."""

    file: FileRecord
    boxes: dict[str, Box]


class _Manifest(msgspec.Struct):
    """manifest.json."""

    format: int
    files: dict[str, FileRecord]


def step_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08}"


class _Missing(MmhubError):
    """Another process has not written its part; if it can say why, that is the better error."""


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them; all ranks call each method, and see the same `folder`.

    `save` copies the tensors and returns; a thread writes them while training goes on. It never talks to other
    processes, for collectives from a second thread may hang: each writes its own file, and the first waits for all.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks | None = None, *, timeout: float = 1800.0) -> None:
        self.folder, self.keep, self.ranks = folder, keep, ranks or Ranks()
        self.saved = -1  # the step that was saved last, maybe not yet on disk
        self.blocked = 0.0  # seconds for which the last save kept training waiting
        self._timeout = timeout  # seconds that the first process waits for the others' files
        self._closing = threading.Event()
        self._structure: Structure | None = None
        self._buffers: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[str] = set()

    # -- saving -------------------------------------------------------------------------------------------------

    def save(
        self,
        model: Model,
        optimizer: Any,
        position: Position,
        *,
        averages: Mapping[str, Tensor] | None = None,
        wait: bool = False,
    ) -> None:
        """Save this step: at once as far as the run can see, and on disk once `wait` returns.

        Waits for the save before. `optimizer` needs `param_groups` and `state`, as torch's own have; `averages` are
        those of the weights, by name.

        Raises:
            MmhubError: the save before has failed, or this one with `wait`; what was on disk before is whole.
        """
        begin = time.perf_counter()
        self.wait()
        name = step_name(position.step)
        aside = self.folder / f".{name}.{self.ranks.tell(os.getpid())}.tmp"
        error: BaseException | None = None
        carried = gather_carried(model, self.ranks)
        try:
            with disk_errors(_WHAT, self.folder):
                copied = self._copy(model, optimizer, aside, carried, averages)
        except (MmhubError, OSError) as failed:
            error = failed
        self._agree(error)
        if self.ranks.first or copied.sharded:
            state = _State(msgspec.convert(msgspec.to_builtins(position), Position), copied.trained, copied.numbers)
            work = threading.Thread(target=self._work, args=(aside, copied, state), name="checkpoint", daemon=True)
            self._thread = work
            work.start()
        self.saved, self.blocked = position.step, time.perf_counter() - begin
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return once everything saved is on disk.

        Raises:
            MmhubError: it is not, on this rank or another; the disk is full, say.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        self._agree(error)

    def close(self) -> None:
        """Finish what is being written, without asking other ranks; what fails now is only said."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            print(f"warning: {self._error}", file=sys.stderr)
        self._thread, self._error = None, None
        self._buffers.clear()

    def _agree(self, error: BaseException | None) -> None:
        """Raise on every rank what went wrong on one."""
        facts = None
        if error is not None:
            facts = [getattr(error, "message", None) or f"{type(error).__name__}: {error}", getattr(error, "hint", "")]
            facts.append(isinstance(error, _Missing))
        failed = [(rank, found) for rank, found in enumerate(self.ranks.gather(facts)) if found]
        if not failed:
            return
        rank, (message, hint, _) = min(failed, key=lambda one: one[1][2])  # the first that does not blame another
        if error is not None and rank == self.ranks.rank:
            raise error
        raise MmhubError(message, hint)

    def _copy(
        self, model: Model, optimizer: Any, aside: Path, carried: dict[str, Any], averages: Mapping[str, Tensor] | None
    ) -> Copied:
        """What has to be done before training goes on."""
        first = self.ranks.first
        copied = copy_tensors(model, optimizer, self._buffers, first=first, carried=carried, averages=averages)
        if self.ranks.first:
            self._structure = self._structure or structure_of(model, copied.tied)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        return copied

    # -- in the thread ------------------------------------------------------------------------------------------

    def _work(self, aside: Path, copied: Copied, state: _State) -> None:
        try:
            with disk_errors(_WHAT, self.folder):
                if not self.ranks.first:
                    aside.mkdir(exist_ok=True)  # a network file system may not show it yet
                    self._write_shard(aside, copied)
                    return
                self._sweep(aside)
                self._write(aside, copied, state)
                target = self.folder / step_name(state.position.step)
                publish(aside, target)
                self._damaged.discard(target.name)
                self._tidy(target, state.position)
        except BaseException as error:
            self._error = error
            with suppress(OSError):
                (aside / f"{self._stem(self.ranks.rank)}.failed").touch()
        finally:
            if self.ranks.first:
                shutil.rmtree(aside, ignore_errors=True)

    def _write(self, aside: Path, copied: Copied, state: _State) -> None:
        """Write all files of the checkpoint but other ranks' pieces, and the manifest once those are there."""
        assert self._structure is not None
        check_space(aside, sum(tensor.nbytes for tensor in copied.tensors.values()))
        known: dict[str, FileRecord] = {}
        if copied.sharded:
            self._write_shard(aside, copied)
            weights = {}
        else:
            weights = {n.removeprefix(MODEL): t for n, t in copied.tensors.items() if n.startswith(MODEL)}
            rest = {name: tensor for name, tensor in copied.tensors.items() if not name.startswith(MODEL)}
            write_tensors(rest, aside / "state.safetensors")
        (aside / "model").mkdir()
        config = write_structure(self._structure, aside / "model", weights)
        known |= {f"model/{name}": record for name, record in config.files.items()}
        write_file(aside / "state.json", msgspec.json.encode(state))
        if copied.sharded:
            known |= self._await_shards(aside)
        for path in sorted(path for path in aside.rglob("*") if path.is_file()):
            name = path.relative_to(aside).as_posix()
            known[name] = known.get(name) or _record(path)
        write_file(aside / "manifest.json", msgspec.json.encode(_Manifest(FORMAT, known)))

    def _write_shard(self, aside: Path, copied: Copied) -> None:
        path = aside / f"{self._stem(self.ranks.rank)}.safetensors"
        write_tensors(copied.tensors, path)
        sync(path)
        write_file(path.with_suffix(".json"), msgspec.json.encode(_Shard(_record(path), copied.boxes)))

    def _stem(self, rank: int) -> str:
        return f"rank-{rank:05}-of-{self.ranks.world:05}"

    def _await_shards(self, aside: Path) -> dict[str, FileRecord]:
        """Wait until every rank has written its file and said so; return what they are.

        Raises:
            _Missing: one says it cannot, or says nothing for too long.
        """
        begin, found = time.monotonic(), dict[str, FileRecord]()
        for rank in range(self.ranks.world):
            stem = self._stem(rank)
            while not (aside / f"{stem}.json").exists():
                seconds = time.monotonic() - begin
                silent = seconds > (min(self._timeout, 10.0) if self._closing.is_set() else self._timeout)
                if silent or (aside / f"{stem}.failed").exists():
                    reason = f"wrote nothing in {seconds:.0f} s" if silent else "could not write its part"
                    raise _Missing(
                        f"no training checkpoint in '{self.folder}': process {rank} {reason}",
                        "every process must see the same run folder",
                    )
                time.sleep(0.01)
            shard = msgspec.json.decode((aside / f"{stem}.json").read_bytes(), type=_Shard)
            found[f"{stem}.safetensors"] = shard.file
        return found

    def _sweep(self, aside: Path) -> None:
        """Remove what killed processes left behind."""
        for path in self.folder.glob(".step-*"):
            if path != aside:
                shutil.rmtree(path, ignore_errors=True)

    def _tidy(self, target: Path, position: Position) -> None:
        """Let the links follow, and drop all but the newest checkpoints; those known to be damaged do not count."""
        sound = [path for path in _steps(self.folder) if path.name not in self._damaged]
        dropped = [path for path in sound[self.keep :] if path != target]
        best = self.folder / step_name(position.best_step)
        _link(self.folder / "last", target.name)
        _link(self.folder / "best", best.name if best.is_dir() and best not in dropped else None)
        for path in dropped:
            old = path.with_name(f".{path.name}.old.tmp")
            with suppress(OSError):
                os.rename(path, old)  # at once: no half of a checkpoint is ever seen under its name
                shutil.rmtree(old, ignore_errors=True)

    # -- loading ------------------------------------------------------------------------------------------------

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """Return the newest valid checkpoint, None if there are none; damaged ones are named, and left as they are.

        Every file is read, each by one of the ranks.

        Raises:
            TrustError: there are checkpoints and all are damaged.
        """
        names = self.ranks.tell([path.name for path in _steps(self.folder)])
        for name in names:
            problems = self.ranks.gather(_damage(self.folder / name, self.ranks.rank, self.ranks.world))
            problem = next((text for text in problems if text), None)
            if problem is None:
                return self.folder / name
            self._damaged.add(name)
            if self.ranks.first:
                warn(f"checkpoint {name} is damaged ({problem}); trying the one before")
        if names:
            raise TrustError(f"all checkpoints in '{self.folder}' are damaged", "start again with a new --out folder")
        return None

    def load_position(self, path: Path) -> Position:
        """Return how far the run of a checkpoint had come."""
        return _read_state(path).position

    def load_model(self, path: Path) -> Model:
        """Load a checkpoint's model, whole, into this process's own memory on the CPU."""
        model = load_structure(path / "model")
        materialize(model, torch.device("cpu"))
        fill_model(model, _stored(path))
        return model

    def load_tensors(
        self, path: Path, model: Model, optimizer: Any = None, averages: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fill parameters and buffers of a model, sharded or not, and an optimizer's state, of any number of ranks.

        The optimizer may be made before or after: parameters stay the same objects. `averages` are filled in place.

        Raises:
            MmhubError: the recipe trains other tensors. TrustError: the checkpoint does not fit the model.
        """
        stored = _stored(path)
        fill_model(model, stored)
        fill_carried(model, stored, self.ranks)
        if averages is not None:
            fill_averages(averages, stored)
        if optimizer is not None:
            state = _read_state(path)
            fill_optimizer(optimizer, parameter_names(model), stored, state.numbers, state.trained)


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _record(path: Path) -> FileRecord:
    return FileRecord(sha256(path), path.stat().st_size)


def _read_manifest(path: Path) -> _Manifest:
    return msgspec.json.decode((path / "manifest.json").read_bytes(), type=_Manifest)


def _read_state(path: Path) -> _State:
    return msgspec.json.decode((path / "state.json").read_bytes(), type=_State)


def _stored(path: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, mapped."""
    found: dict[str, Stored] = {}
    files = _read_manifest(path).files
    for name in sorted(files):
        if name.endswith(".safetensors"):
            boxes: dict[str, Box] = {}
            if name.startswith("rank-"):
                table = (path / name).with_suffix(".json")
                boxes = msgspec.json.decode(table.read_bytes(), type=_Shard).boxes
            add_stored(found, path / name, MODEL if name.startswith("model/") else "", boxes)
    return found


def _damage(path: Path, rank: int, world: int) -> str | None:
    """Say what is wrong with this rank's share of the files, None if nothing."""
    try:
        if not stat.S_ISREG((path / "manifest.json").lstat().st_mode):
            return "manifest.json is no file"
        manifest = _read_manifest(path)
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        return f"manifest.json: {getattr(error, 'strerror', None) or error}"
    if manifest.format != FORMAT:
        return f"manifest.json has format {manifest.format}, this version of mmhub reads {FORMAT}"
    files = manifest.files
    missing = {"state.json", "model/config.json"} - files.keys()
    if missing:
        return f"manifest.json does not list {min(missing)}"
    shares = sorted(files, key=lambda name: -files[name].bytes)[rank::world]
    return next((text for name in shares if (text := _misfit(path / name, name, files[name]))), None)


def _misfit(path: Path, name: str, wanted: FileRecord) -> str | None:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is no file"
        if found.st_size != wanted.bytes:
            return f"{name} has {found.st_size} bytes instead of {wanted.bytes}"
        return None if sha256(path) == wanted.sha256 else f"{name} has changed"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name}: {error.strerror}"


def _link(path: Path, target: str | None) -> None:
    """Let a link lead to another name beside it, to none if that is None; where there can be no links, do nothing."""
    aside = path.with_name(f".{path.name}.tmp")
    with suppress(OSError, NotImplementedError):
        if target is None and path.is_symlink():
            path.unlink()
        elif target is not None:
            aside.unlink(missing_ok=True)
            aside.symlink_to(target, target_is_directory=True)
            os.replace(aside, path)
    with suppress(OSError):
        aside.unlink(missing_ok=True)
