"""The training loop: from a recipe to `OUT/model`, stopping cleanly at any step and going on from there bit-exactly."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch

from mmhub.batch import Batch
from mmhub.build import build_model, local_name
from mmhub.checkpoint import load, read_config
from mmhub.config import Recipe, dump_recipe, override_recipe, read_recipe
from mmhub.data.loader import Collate, batches_of, epoch_order, load_batches, row_seed, usable, worker_count
from mmhub.data.sources import Rows, open_rows, require_columns
from mmhub.device import find_device, find_precision
from mmhub.engine.provenance import provenance
from mmhub.engine.report import Reporter, TrainRun
from mmhub.engine.state import Position, find_state, load_model, load_state, save_state, step_name
from mmhub.errors import InputError, Interrupted, MmhubError, UsageError
from mmhub.evaluation import EvalOptions, data_name, evaluate
from mmhub.files import disk_errors, write_file
from mmhub.hub.card import merge_card
from mmhub.hub.pull import pull
from mmhub.interfaces import Policy, find_task
from mmhub.lineage import code_state
from mmhub.model import Columns, Model
from mmhub.optim import learning_rate_factor, learning_rate_groups, seed_step
from mmhub.weights import copy_parameters


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind: its folder, the best model's folder, that model's metrics, steps and seconds."""

    out: Path
    model: Path
    metrics: dict[str, Any]
    steps: int
    seconds: float

    def load(self) -> Model:
        """Load the best model."""
        return load(self.model)


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    quiet: bool = True,
    overrides: Sequence[str] = (),
) -> TrainResult:
    """Train what a recipe (a path, a table or a `Recipe`) describes and write the run to the folder `out`.

    `out` defaults to `runs/` and the recipe file's name, or the task's for a table.
    `resume` goes on from the newest valid checkpoint in `out`, from the beginning if there is none.

    Raises:
        UsageError: the recipe or folder is wrong. InputError: a row cannot be read. Interrupted: Ctrl-C; resumable.
        MmhubError: the loss is not finite; the last good checkpoint is kept.
    """
    folder, name = None, ""
    if isinstance(recipe, (str, Path)):
        folder, name = Path(recipe).resolve().parent, Path(recipe).stem
        recipe = read_recipe(Path(recipe), overrides)
    else:
        recipe = override_recipe(recipe, overrides)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes were launched, but this version trains in one", "start it without torchrun")
    out = Path(out) if out is not None else Path("runs") / (name or recipe.task)
    return _Run(recipe, out, folder, resume=resume, quiet=quiet).train()


class _Run:
    """One run: everything between reading the recipe and the finished model folder."""

    def __init__(self, recipe: Recipe, out: Path, folder: Path | None, *, resume: bool, quiet: bool) -> None:
        self.recipe, self.out, self.folder = _with_base_columns(recipe, out, folder, resume=resume), out, folder
        self.task = find_task(recipe.task)
        self.options = recipe.train
        self.device = find_device(recipe.train.device)
        self.precision = find_precision(recipe.train.precision, self.device)
        self.code = code_state(folder or Path.cwd())
        self.stop_signal = 0
        self._check_out(resume)
        self.rows, self.valid = self._open_data()
        state = find_state(out / "checkpoints", _warn) if resume else None
        self.model = self._model(state).to(self.device)
        self.model.unimodal_loss = recipe.train.unimodal_loss
        self.optimizer = torch.optim.AdamW(
            learning_rate_groups(self.model, recipe.model, self.options.learning_rate, self.options.weight_decay),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.position = load_state(state, self.optimizer) if state else self._start()
        self._check_rows()
        self.batches_per_epoch = math.ceil(len(self.rows) / self.options.batch_size)
        steps = math.ceil(self.batches_per_epoch / self.options.accumulate) * self.options.epochs
        self.total_steps = min(steps, self.options.max_steps or steps)
        self._prepare_out()
        run = TrainRun(out, msgspec.to_builtins(self._resolved()), self.total_steps)
        with disk_errors("the run", out):
            self.reporter = Reporter(run, quiet=quiet, step=self.position.step, lines=self.position.lines)
        self._announce(state)

    # -- setting up ---------------------------------------------------------------------------------------------

    def _check_out(self, resume: bool) -> None:
        there = next((path for path in (self.out, *self.out.parents) if path.exists()), None)
        if there and not there.is_dir():
            raise UsageError(f"'{there}' is a file", "name a folder with --out")
        if self.out.is_dir() and any(self.out.iterdir()) and not resume:
            raise UsageError(f"the run folder '{self.out}' exists", "add --resume to go on, or name another with --out")
        stored = self.out / "recipe.toml"
        if stored.exists():
            self._check_same(read_recipe(stored))
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise UsageError(f"'{self.out}' is no run folder, it has no recipe.toml", "name another with --out")

    def _start(self) -> Position:
        return Position(rows=len(self.rows), parents=self.model.parents)

    def _check_rows(self) -> None:
        """A resumed run must read the same table; a different length is what can be seen at no cost."""
        if self.position.rows != len(self.rows):
            raise UsageError(
                f"the training data has {len(self.rows)} rows, and {self.position.rows} when this run was started",
                "restore the data, or start a new run with another --out",
            )

    def _check_same(self, stored: Recipe) -> None:
        """A resumed run must be the same run: only what changes no result may differ."""
        for part in ("task", "seed", "model", "data", "train"):
            old, new = getattr(stored, part), getattr(self._resolved(), part)
            if part == "train":
                free = {"checkpoint_every": 1, "keep": 1, "log_every": 1, "device": ""}
                old, new = (_with(x, free) for x in (old, new))
            if part == "data":
                old, new = (_with(x, {"workers": 0}) for x in (old, new))
            if old != new:
                raise UsageError(
                    f"[{part}] differs from the recipe this run in '{self.out}' was started with",
                    "resume with the same recipe, or start a new run with another --out",
                )

    def _resolved(self) -> Recipe:
        """The recipe with data paths made absolute, so that the copy in the run folder can be run again."""
        data = self.recipe.data
        sources = {key: _absolute(getattr(data, key), self.folder) for key in ("train", "valid")}
        return _with(self.recipe, {"data": _with(data, sources)})

    def _open_data(self) -> tuple[Rows, Rows | None]:
        data = self.recipe.data
        if not data.train:
            raise UsageError("the recipe names no training data", 'add train = "FILE" under [data]')
        names = data.columns or None
        rows = open_rows(data.train, columns=names, base=self.folder)
        wanted = [*self._inputs().values(), *([data.target] if data.target else [])]
        hint = "see inputs and target under [data]"
        require_columns(rows, wanted, hint)
        valid = None
        if data.valid:
            valid = open_rows(data.valid, columns=names, base=self.folder, split="validation")
            require_columns(valid, wanted, hint)
        elif data.valid_fraction:
            rows, valid = _split(rows, data.valid_fraction, self.recipe.seed)
        return rows, valid

    def _inputs(self) -> dict[str, str]:
        """Modality to column; a modality named like a column needs no entry."""
        given = dict(self.recipe.data.inputs)
        if self.recipe.model.base:  # its encoders' tables only say what to freeze
            return given
        modalities = list(self.recipe.model.encoders) or list(given)
        extra = [m for m in given if m not in modalities]
        if extra:
            raise UsageError(f"data.inputs feeds {extra[0]!r}, but the model has no such encoder", "remove it")
        return {m: given.get(m, m) for m in modalities}

    def _prepare_out(self) -> None:
        with disk_errors("the run", self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            write_file(self.out / "recipe.toml", dump_recipe(self._resolved()))

    def _model(self, state: Path | None) -> Model:
        data = self.recipe.data
        columns = Columns(self._inputs(), data.target, tuple(data.columns))
        if state is not None:
            model = load_model(state)
            for modality, part in self.recipe.model.encoders.items():
                if part.freeze:
                    model.freeze(modality)
            return model
        self._check_target()
        try:
            model = build_model(
                self.task, self.recipe.model, self._values, columns=columns, folder=self.folder, seed=self.recipe.seed
            )
        except InputError as error:
            if error.row is None or error.modality:
                raise
            raise self._at_target(self.rows, error.row, error) from None
        copy_parameters(model)
        self._check_targets(model)
        return model

    def _check_target(self) -> None:
        if self.task.decoder in ("classification", "multilabel", "regression") and not self.recipe.data.target:
            raise UsageError(f"{self.task.name} needs a target column", 'add target = "COLUMN" under [data]')

    def _check_targets(self, model: Model) -> None:
        """Try the targets now: a label unseen in training must not end a run after its first epoch."""
        target = self.recipe.data.target
        if not target or self.recipe.data.on_error == "skip":
            return
        kept_decoder = self.recipe.model.base and not self.recipe.model.decoder
        for rows in (self.rows if kept_decoder else None, self.valid):
            values = rows.column(target) if rows is not None else iter(())
            for start in range(0, len(rows) if rows is not None else 0, 1024):
                try:
                    model.decoder.encode_targets(list(islice(values, 1024)))
                except InputError as error:
                    assert rows is not None
                    raise self._at_target(rows, start + (error.row or 0), error) from None

    def _at_target(self, rows: Rows, row: int, error: InputError) -> InputError:
        """Say which target is wrong, and what can be done."""
        hint = error.hint or 'fix the row, or set data.on_error = "skip"'
        if self.recipe.model.base and not self.recipe.model.decoder:
            hint = f'to learn other targets, give the model a new head: [model.decoder] use = "{self.task.decoder}"'
        return InputError(f"{rows.where(row)}, column '{self.recipe.data.target}': {error.message}", hint)

    def _values(self, name: str) -> Iterable[Any]:
        if name != "target":
            inputs = self._inputs()
            cells = enumerate(self.rows.column(inputs[name]))
            return (usable(name, cell, self.rows.folder(i), len(inputs) == 1) for i, cell in cells)
        values = self.rows.column(self.recipe.data.target)
        if self.recipe.data.on_error == "stop":
            return values
        return (v for v in values if v is not None and v != "" and v == v)  # rows without a target will be skipped

    def _announce(self, state: Path | None) -> None:
        parts = self.model.parts().values()
        count = sum(p.numel() for part in parts for p in part.parameters())
        trained = sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
        dtype = "bf16" if self.precision == torch.bfloat16 else "fp32"
        self.reporter.say(
            f"{self.task.name}: {len(self.rows)} rows, {count:,} parameters ({trained:,} trained), "
            f"{self.total_steps} steps on {self.device} in {dtype}"
        )
        if state:
            self.reporter.say(f"resuming from step {self.position.step}")

    # -- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Run to the end, or to the first stop signal."""
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.clock = time.perf_counter()
        try:
            with self._signals():
                self._epochs()
                return self._finish()
        except torch.OutOfMemoryError:
            raise MmhubError(
                f"out of memory at step {self.position.step + 1} with batches of {self.options.batch_size}",
                "lower train.batch_size and raise train.accumulate by as much",
            ) from None
        finally:
            self.reporter.close()
            self._forget_if_empty()

    def _forget_if_empty(self) -> None:
        """A run that failed before its first step leaves nothing, so that the mended recipe can be run as it is."""
        if self.position.step or any((self.out / name).exists() for name in ("checkpoints", "model")):
            return
        for name in ("recipe.toml", "metrics.jsonl"):
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.out / "tensorboard", ignore_errors=True)
        with suppress(OSError):
            self.out.rmdir()  # whatever else is there stays

    def _epochs(self) -> None:
        while self.position.epoch < self.options.epochs and not self._done():
            for group in self._groups():
                if group:
                    self._step(group)
                self._after_step()
                if self._done():
                    return
            self.position.epoch, self.position.batches = self.position.epoch + 1, 0
            if not self.position.step:
                raise InputError(f"none of the {len(self.rows)} training rows could be read", "check the data")
            if not self.options.eval_every:
                self._evaluate()

    def _done(self) -> bool:
        patience = self.options.patience
        tired = patience > 0 and self.position.evaluations_without_gain >= patience
        return self.position.step >= self.total_steps or tired

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of each optimizer step in the rest of this epoch; counts and reports skipped rows."""
        position, accumulate = self.position, self.options.accumulate
        order = batches_of(epoch_order(len(self.rows), self.recipe.seed, position.epoch), self.options.batch_size)
        order = order[position.batches :]
        collate = Collate(
            rows=self.rows,
            processors=self.model.processors,
            inputs=dict(self.model.columns.inputs),
            decoder=self.model.decoder,
            target=self.recipe.data.target,
            policy=Policy(urls=self.recipe.data.allow_urls),
            skip=self.recipe.data.on_error == "skip",
            seed=row_seed(self.recipe.seed, position.epoch),
        )
        cuda = self.device.type == "cuda"
        loaded = load_batches(collate, order, worker_count(self.recipe.data.workers, self.device), pin_memory=False)
        group: list[Batch] = []
        for count, part in enumerate(loaded, 1):
            if part.error:
                raise part.error
            for text in part.skipped:
                self.position.skipped += 1
                self.reporter.say(f"skipped: {text}")
            position.batches += 1
            if part.batch is not None:
                group.append(part.batch.to(self.device, non_blocking=cuda))
            if count % accumulate == 0 or count == len(order):
                yield group
                group = []

    def _step(self, group: list[Batch]) -> None:
        self.model.train()
        seed_step(self.recipe.seed, self.position.step)
        rate = learning_rate_factor(self.position.step, self.total_steps, self.recipe)
        for params in self.optimizer.param_groups:
            params["lr"] = params["base_lr"] * rate
        total, loss = sum(batch.size for batch in group), 0.0
        for batch in group:
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                output = self.model(batch)
            assert output.loss is not None
            part = output.loss * (batch.size / total)
            loss += float(part.detach())
            self._check_finite(loss, "loss", group)
            part.backward()
        trained = [p for params in self.optimizer.param_groups for p in params["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.options.clip_norm or math.inf))
        self._check_finite(norm, "gradient norm", group)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.position.loss_sum += loss
        self.position.loss_steps += 1
        self.reporter.step(loss)
        if self.position.step % self.options.log_every == 0:
            self._log(norm, rate, total)

    def _check_finite(self, value: float, what: str, group: list[Batch]) -> None:
        if math.isfinite(value):
            return
        rows = [i for batch in group for i in batch.index]
        shown = ", ".join(self.rows.where(i) for i in rows[:4]) + (
            f" and {len(rows) - 4} more" if len(rows) > 4 else ""
        )
        raise MmhubError(
            f"the {what} is {value} at step {self.position.step + 1} (epoch {self.position.epoch + 1}, batch: {shown})",
            "what was saved before is kept; look at these rows, or lower train.learning_rate",
        )

    def _log(self, norm: float, rate: float, rows: int) -> None:
        position = self.position
        self._write_line(
            {
                "epoch": position.epoch + position.batches / self.batches_per_epoch,
                "loss": position.loss_sum / position.loss_steps,
                "learning_rate": self.options.learning_rate * rate,
                "gradient_norm": norm,
                "seconds": round(self._seconds(), 3),
            }
        )
        position.loss_sum, position.loss_steps = 0.0, 0

    def _write_line(self, values: dict[str, Any]) -> None:
        with disk_errors("metrics.jsonl", self.out):
            self.reporter.log(self.position.step, values)

    def _seconds(self) -> float:
        return self.position.seconds + time.perf_counter() - self.clock

    def _after_step(self) -> None:
        step = self.position.step
        every = self.options.eval_every
        if every and step % every == 0 and step != self.position.evaluated_step:
            self._evaluate()
        if self.stop_signal:
            self._save()
            name = "interrupted" if self.stop_signal == signal.SIGINT else "terminated"
            code = 128 + self.stop_signal
            raise Interrupted(f"{name} at step {step}; saved", "go on with the same command and --resume", code)
        if step % self.options.checkpoint_every == 0 and step:
            self._save()

    def _save(self) -> None:
        position = self.position
        position.seconds, self.clock = self._seconds(), time.perf_counter()
        position.lines = self.reporter.lines
        save_state(self.out / "checkpoints", self.model, self.optimizer, position, self.options.keep)

    # -- evaluating ---------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        self.position.evaluated_step = self.position.step
        if self.valid is None:
            return
        report = self._measure(self.model, subsets=False)
        value = report["metrics"][self.task.monitor]
        if not math.isfinite(report["metrics"].get("loss", 0.0)):
            raise MmhubError(
                f"the validation loss is {report['metrics']['loss']} at step {self.position.step}",
                "what was saved before is kept; lower train.learning_rate",
            )
        loss = report["metrics"].get("loss", 0.0)
        better = self._is_better(value, loss)
        if better:
            gained = value != self.position.best  # a lower loss at the same value does not renew the patience
            self.position.evaluations_without_gain = 0 if gained else self.position.evaluations_without_gain + 1
            self.position.best, self.position.best_loss, self.position.best_step = value, loss, self.position.step
            with disk_errors("the model", self.out):
                self.model.save(self.out / "model")
        else:
            self.position.evaluations_without_gain += 1
        self._write_line({"valid": report["metrics"]})
        shown = " ".join(f"{key} {number:.4f}" for key, number in report["metrics"].items())
        self.reporter.say(
            f"step {self.position.step}/{self.total_steps} {self._seconds():.0f} s: "
            f"valid {shown}{' (best)' if better else ''}"
        )

    def _is_better(self, value: float, loss: float) -> bool:
        """Compare the task's main metric, and where that is equal, as on small validation sets, the loss."""
        best = self.position.best
        if best is None or value == best:
            return best is None or loss < self.position.best_loss
        return value > best if self.task.higher_is_better else value < best

    def _measure(self, model: Model, *, subsets: bool) -> dict[str, Any]:
        data = self.recipe.data
        options = EvalOptions(
            batch_size=max(self.options.batch_size, 64),
            workers=data.workers,
            subsets=subsets,
            skip=data.on_error == "skip",
            policy=Policy(urls=data.allow_urls),
            precision=self.precision,
            progress=self.reporter.watch,
        )
        return evaluate(model, self.valid, inputs=model.columns.inputs, target=data.target, options=options)

    def _finish(self) -> TrainResult:
        """Keep the last state beside the best model, and describe that: results by subset, provenance and card."""
        position, folder = self.position, self.out / "model"
        if self.valid is None:
            self.model.save(folder)
        elif position.evaluated_step != position.step:
            self._evaluate()
        if not (self.out / "checkpoints" / step_name(position.step)).exists():
            self._save()
        metrics: dict[str, Any] = {}
        seconds = self._seconds()
        if self.valid is not None:
            best = load(folder)
            copy_parameters(best)
            report = self._measure(best.to(self.device), subsets=True) | {"data": data_name(self.valid)}
            report.pop("name")
            metrics = report["metrics"]
            with disk_errors("the model", folder):
                (folder / "eval").mkdir(exist_ok=True)
                write_file(folder / "eval" / f"{self.task.name}.json", json.dumps(report, indent=2) + "\n")
        facts = provenance(
            self.recipe,
            self.model,
            self.rows,
            self.valid,
            steps=position.step,
            seconds=seconds,
            parents=position.parents,
            code=self.code,
        )
        with disk_errors("the model", folder):
            write_file(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
            write_file(folder / "README.md", self._card(folder))
        self.reporter.say(f"done in {seconds:.0f} s, best at step {position.best_step or position.step}: {folder}")
        if position.skipped:
            self.reporter.say(f"{position.skipped} unreadable rows were skipped")
        return TrainResult(self.out, folder, metrics, position.step, round(seconds, 3))

    def _card(self, folder: Path) -> str:
        card = self.recipe.card
        known = {"license": card.license, "language": card.language, "datasets": card.datasets}
        return merge_card(folder, read_config(folder), name=self.out.name, metadata=known, summary=card.summary)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM finish the step and save; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        main = os.getpid()

        def on_signal(number: int, frame: Any) -> None:
            if os.getpid() != main:  # a decoding worker, which Ctrl-C reaches too; the main process ends it
                return
            if self.stop_signal:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.reporter.say_from_signal("stopping after this step; once more to stop at once")

        old = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _with_base_columns(recipe: Recipe, out: Path, folder: Path | None, *, resume: bool) -> Recipe:
    """Fill in the columns that a recipe with `model.base` does not name: those the base was trained with.

    A resumed run has them in its own recipe.toml, and needs the base no more.
    """
    data, stored = recipe.data, out / "recipe.toml"
    if not recipe.model.base or (data.inputs and data.target):
        return recipe
    known: Any
    if resume and stored.exists():
        known = read_recipe(stored).data
        inputs = known.inputs
    else:
        config = read_config(pull(local_name(recipe.model.base, folder)))
        known = config.data
        encoders = (role.removesuffix("_encoder") for role in config.components if role.endswith("_encoder"))
        inputs = {m: known.inputs.get(m, m) for m in encoders if not known.inputs or m in known.inputs}
    names = known.columns if not (data.inputs or data.target or data.columns) else data.columns
    changes = {"inputs": data.inputs or inputs, "target": data.target or known.target, "columns": names}
    return _with(recipe, {"data": _with(data, changes)})


def _split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    order = epoch_order(len(rows), seed, -1)
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise UsageError(f"data.valid_fraction = {fraction} leaves no training rows of {len(rows)}", "lower it")
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))


def _absolute(source: Any, folder: Path | None) -> Any:
    if isinstance(source, dict):
        return {key: _absolute(value, folder) for key, value in source.items()}
    if isinstance(source, list):
        return [_absolute(value, folder) for value in source]
    for base in (folder, Path.cwd()):
        if base is not None and source and (base / source).exists():
            return str((base / source).resolve())
    return source


def _with(struct: Any, changes: Mapping[str, Any]) -> Any:
    return msgspec.structs.replace(struct, **changes)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
