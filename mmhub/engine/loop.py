"""The training loop: from a recipe to `OUT/model`, stopping cleanly at any step and going on from there bit-exactly."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch

from mmhub.build import build_model
from mmhub.checkpoint import load, read_config, save
from mmhub.config import Recipe, dump_recipe, override_recipe, read_recipe
from mmhub.data.lengths import Lengths, measure_rows
from mmhub.data.loader import Collate
from mmhub.data.sources import Rows
from mmhub.data.stream import Stream, join_states
from mmhub.device import find_device, find_precision
from mmhub.engine.compute import prepare_model
from mmhub.engine.data import TrainingData, resolved, with_base_columns
from mmhub.engine.data import replace as with_values
from mmhub.engine.features import open_features
from mmhub.engine.feed import AUTO_ROWS, Feed, Turn, stand_in, stand_in_items
from mmhub.engine.meter import Meter
from mmhub.engine.optimizer import make_optimizer
from mmhub.engine.parallel import Parallel
from mmhub.engine.profiler import Profiler
from mmhub.engine.provenance import provenance
from mmhub.engine.ranks import Ranks, is_lost, join
from mmhub.engine.report import Reporter, TrainRun, run_facts
from mmhub.engine.signals import StopSignal
from mmhub.engine.state import Checkpoints, Position
from mmhub.engine.step import Stepper
from mmhub.errors import InputError, Interrupted, MmhubError, UsageError
from mmhub.evaluation import EvalOptions, EvaluationStopped, data_name, evaluate
from mmhub.files import disk_errors, write_file
from mmhub.hub.card import merge_card
from mmhub.interfaces import Policy, find_task
from mmhub.lineage import code_state
from mmhub.model import Model
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

    In processes launched by `torchrun` each trains its share of every batch; the first one writes and reports.

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
    out = Path(out) if out is not None else Path("runs") / (name or recipe.task)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # by torchrun, with the same arguments
    ranks = join(find_device(recipe.train.device))
    try:
        return _Run(recipe, out, folder, ranks, resume=resume or restarted, quiet=quiet).train()
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise MmhubError("another process of this run has ended", "what it said itself tells why") from None


class _Run:
    """One run: everything between reading the recipe and the finished model folder."""

    def __init__(
        self, recipe: Recipe, out: Path, folder: Path | None, ranks: Ranks, *, resume: bool, quiet: bool
    ) -> None:
        self.recipe, self.out, self.folder = with_base_columns(recipe, out, folder, resume=resume), out, folder
        self.ranks, self.device, self.quiet = ranks, ranks.device, quiet or not ranks.first
        self.task = find_task(recipe.task)
        self.options = recipe.train
        if ranks.several and self.options.batch_size == "auto":
            raise UsageError('train.batch_size = "auto" is for one process', "give a number of rows")
        self.precision = find_precision(recipe.train.precision, self.device)
        self.code = code_state(folder or Path.cwd())
        if ranks.first:
            self._check_out(resume)
        ranks.barrier()
        self.data = TrainingData(self.recipe, self.task, folder)
        self.rows, self.valid = self.data.rows, self.data.valid
        self.fingerprint = self.data.fingerprint()
        self.checkpoints = Checkpoints(out / "checkpoints", self.options.keep, ranks)
        state = self.checkpoints.newest(_warn) if resume else None
        self.position = self.checkpoints.load_position(state) if state else self._start()
        self.place = self.position.stream  # where the run was resumed, for ranks that have had no batch since
        self._check_rows()
        self._build(state)
        self.feed = self._feed()
        self.planned = self.feed.steps()
        self.batches_per_epoch = self.feed.batches()
        if ranks.first:
            self._prepare_out()
        ranks.barrier()
        run = TrainRun(out, msgspec.to_builtins(self._resolved()), self.planned)
        with disk_errors("the run", out):
            self.reporter = Reporter(
                run,
                quiet=self.quiet,
                step=self.position.step,
                lines=self.position.lines,
                ranks=ranks,
                facts=run_facts(self.model, self.device, self.precision, ranks),
            )
        self.stop = StopSignal(self.reporter.say_from_signal)
        self.profiler = Profiler(out, self.options.profile, self.device, ranks.rank)
        self.stepper = self._stepper()
        self.saved_step = self.position.step if state else -1
        self.told = False  # whether the meter's problem was
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

    def _check_same(self, stored: Recipe) -> None:
        """A resumed run must be the same run: only what changes no result may differ."""
        for part in ("task", "seed", "model", "data", "train"):
            old, new = getattr(stored, part), getattr(self._resolved(), part)
            if part == "train":
                old, new = (with_values(x, _FREE) for x in (old, new))
            if part == "data":
                old, new = (with_values(x, {"workers": 0}) for x in (old, new))
            if old != new:
                raise UsageError(
                    f"[{part}] differs from the recipe this run in '{self.out}' was started with",
                    "resume with the same recipe, or start a new run with another --out",
                )

    def _start(self) -> Position:
        return Position(rows=self.data.count or 0, fingerprint=self.fingerprint)

    def _check_rows(self) -> None:
        """A resumed run must read the same data."""
        hint = "restore the data, or start a new run with another --out"
        if self.position.rows != (self.data.count or 0):
            raise UsageError(
                f"the training data has {self.data.count} rows, and {self.position.rows} when this run was started",
                hint,
            )
        if self.position.fingerprint != self.fingerprint:
            raise UsageError(f"'{self.rows.source}' has changed since this run was started", hint)

    def _resolved(self) -> Recipe:
        return resolved(self.recipe, self.folder)

    def _prepare_out(self) -> None:
        with disk_errors("the run", self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            write_file(self.out / "recipe.toml", dump_recipe(self._resolved()))

    def _build(self, state: Path | None) -> None:
        """Build or restore the model, put it on its device and on all ranks, and make its optimizer."""
        self.model = self._model(state)
        if not state:
            self.position.parents = self.model.parents
        self.model.unimodal_loss = self.options.unimodal_loss
        self.model.to(self.device)
        prepare_model(self.model, self.options, self.device, self.precision)
        self.features, self.valid_features = self._frozen(self.rows, True), self._frozen(self.valid, False)
        self.lengths = self._measure_rows(self.rows) if isinstance(self.rows, Rows) else None
        self.valid_lengths = self._measure_rows(self.valid) if self.valid is not None else None
        if self.ranks.several:
            examples = stand_in_items(self._collate(), self._some_rows())
            self.model.stand_ins = {name: items.to(self.device) for name, items in examples.items()}
        self.meter = Meter(self.model, self.device, self.ranks, self.precision)
        if self.ranks.several and (example := stand_in(self._collate(), self._some_rows())):
            self.meter.measure(example.to(self.device))
        self.parallel = Parallel(self.model, self.options, self.ranks, self.precision)
        self.optimizer = make_optimizer(self.model, self.recipe, self.device)
        if state:
            self.checkpoints.load_tensors(state, self.model, self.optimizer)

    def _model(self, state: Path | None) -> Model:
        if state is not None:
            model = self.checkpoints.load_model(state)
            for modality, part in self.recipe.model.encoders.items():
                if part.freeze:
                    model.freeze(modality)
            return model
        try:
            model = build_model(
                self.task,
                self.recipe.model,
                self.data.values,
                columns=self.data.columns,
                folder=self.folder,
                seed=self.recipe.seed,
            )
        except InputError as error:
            if error.row is None or error.modality:
                raise
            raise self.data.at_target(error.row, error) from None
        copy_parameters(model)
        self.data.check_targets(model)
        return model

    def _collate(self) -> Collate:
        return Collate(
            rows=self.rows,
            processors=self.model.processors,
            inputs=dict(self.model.columns.inputs),
            decoder=self.model.decoder,
            target=self.recipe.data.target,
            policy=self._policy(),
            skip=self.recipe.data.on_error == "skip",
        )

    def _policy(self) -> Policy:
        return Policy(urls=self.recipe.data.allow_urls)

    def _feed(self) -> Feed:
        """What this rank trains on."""
        collate = replace(self._collate(), features=self.features)
        if self.lengths is not None:
            collate = replace(collate, read=self.lengths.read)
        return Feed(self.recipe, self.rows, collate, self._measure_rows, self.lengths, self.ranks)

    def _measure_rows(self, rows: Any) -> Lengths:
        """Measure rows, and read once what is small; of all inputs, so that no cache decides what a batch is."""
        model = self.model
        return measure_rows(rows, model.processors, model.encoders, dict(model.columns.inputs), self._policy())

    def _frozen(self, rows: Any, training: bool) -> dict[str, Any]:
        if not isinstance(rows, Rows) or not self.model.frozen or not self.options.cache_features:
            return {}
        if training and self._seen_rows() < len(rows):
            return {}
        return open_features(
            self.model,
            rows,
            dict(self.model.columns.inputs),
            policy=self._policy(),
            skip=self.recipe.data.on_error == "skip",
            training=training,
            precision=self.precision,
            limit_gb=self.options.cache_gb,
            workers=self.recipe.data.workers,
            ranks=self.ranks,
            say=self._say_early,
        )

    def _seen_rows(self) -> float:
        """How many rows a run with `max_steps` looks at, at most."""
        options = self.options
        rows = math.inf if options.batch_tokens else AUTO_ROWS if options.batch_size == "auto" else options.batch_size
        return options.max_steps * rows * options.accumulate if options.max_steps else math.inf

    def _stepper(self) -> Stepper:
        spare = stand_in(self.feed.collate, self._some_rows()) if self.ranks.several else None
        return Stepper(
            self.recipe,
            self.model,
            self.optimizer,
            self.parallel,
            self.ranks,
            self.precision,
            self.meter,
            self.planned,
            spare.to(self.device) if spare else None,
            self.rows.where,
            self.reporter.say,
        )

    def _some_rows(self) -> Any:
        if isinstance(self.rows, Rows):
            return iter(self.rows)
        return iter(self.rows)

    def _say_early(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def _announce(self, state: Path | None) -> None:
        parts = self.model.parts().values()
        count = sum(p.numel() for part in parts for p in part.parameters())
        trained = sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
        dtype = "bf16" if self.precision == torch.bfloat16 else "fp32"
        rows = f"{self.data.count} rows" if self.data.count is not None else f"streaming '{self.rows.source}'"
        several = f" x {self.ranks.world} ({self.options.parallel})" if self.ranks.several else ""
        self.reporter.say(
            f"{self.task.name}: {rows}, {count:,} parameters ({trained:,} trained), "
            f"{self.planned} steps on {self.device.type}{several} in {dtype}"
        )
        if state:
            self.reporter.say(f"resuming from step {self.position.step}")

    # -- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Run to the end, or to the first stop signal."""
        self.clock = time.perf_counter()
        try:
            with self.stop.watched():
                self._epochs()
                return self._finish()
        finally:
            self.profiler.close()
            self.reporter.close()
            self.checkpoints.close()
            if self.ranks.first:
                self._forget_if_empty()

    def _forget_if_empty(self) -> None:
        """A run that failed before its first step leaves nothing, so that the mended recipe can be run as it is."""
        if self.position.step or any((self.out / name).exists() for name in ("checkpoints", "model")):
            return
        for name in ("recipe.toml", "metrics.jsonl", "sessions.jsonl"):
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.out / "tensorboard", ignore_errors=True)
        with suppress(OSError):
            self.out.rmdir()  # whatever else is there stays

    def _epochs(self) -> None:
        self._evaluate_if_due()
        while self.position.epoch < self.options.epochs and not self._done():
            self._epoch()
            if self._done():
                return
            if not self.position.step:
                count = "" if self.data.count is None else f"{self.data.count} "
                raise InputError(f"none of the {count}training rows could be read", "check the data")
            self.position.epoch, self.position.batches, self.position.stream = self.position.epoch + 1, 0, None
            self._evaluate_if_due()

    def _epoch(self) -> None:
        self.checkpoints.wait()  # decoding processes are forked now, which is safe from one thread alone
        turns = self.feed.turns(self.position)
        while not self._done():
            with self.meter.waiting():
                turn = next(turns, None)
            rows = sum(batch.size for batch in turn.batches if batch) if turn else 0
            facts = (turn is not None, bool(turn and turn.error), len(turn.skipped) if turn else 0, bool(self.stop))
            total, going, failed, skipped, stopped = self.ranks.sum(rows, *facts)
            if failed:
                raise self._shared_error(turn)
            if stopped:
                self._save_and_stop()
            if not going:
                return
            if skipped:
                self._tell_skipped(turn)
            if total:
                self._step(turn or Turn(), total)
            self._advance(turn)
            self._after_step()

    def _advance(self, turn: Turn | None) -> None:
        if turn:
            self.position.batches, self.position.stream = turn.count, turn.stream

    def _last_step(self) -> float:
        return self.options.max_steps or math.inf

    def _done(self) -> bool:
        patience = self.options.patience
        tired = patience > 0 and self.position.evaluations_without_gain >= patience
        return self.position.step >= self._last_step() or tired

    def _shared_error(self, turn: Turn | None) -> InputError:
        """The first rank's error that has one, on all ranks alike."""
        own = turn.error if turn else None
        found = self.ranks.gather([own.message, own.hint] if own else None)
        message, hint = next(error for error in found if error)
        return own if own and not self.ranks.several else InputError(message, hint)

    def _tell_skipped(self, turn: Turn | None) -> None:
        for texts in self.ranks.gather(turn.skipped if turn else []):
            for text in texts:
                self.position.skipped += 1
                self.reporter.say(f"skipped: {text}")

    def _step(self, turn: Turn, rows: float) -> None:
        rate = self.stepper.rate(self.position.step)
        loss, norm = self.stepper.take(turn, rows, self.position)
        self._advance(turn if turn.batches else None)
        self.position.step += 1
        self.position.loss_sum += loss
        self.position.loss_steps += 1
        self.meter.step()
        self.profiler.step()
        self.reporter.step(loss)
        if self.position.step % self.options.log_every == 0:
            self._log(norm, rate)

    def _log(self, norm: float, rate: float) -> None:
        position = self.position
        done = position.batches / self.batches_per_epoch if self.batches_per_epoch else 0.0
        self._write_line(
            {
                "epoch": position.epoch + done,
                "loss": position.loss_sum / position.loss_steps,
                "learning_rate": self.options.learning_rate * rate,
                "gradient_norm": norm,
                "seconds": round(self._seconds(), 3),
                "speed": self.meter.values(),
            }
        )
        if self.meter.problem and not self.told:
            self.told = True
            self.reporter.say(self.meter.problem)
        position.loss_sum, position.loss_steps = 0.0, 0

    def _write_line(self, values: dict[str, Any]) -> None:
        with disk_errors("metrics.jsonl", self.out):
            self.reporter.log(self.position.step, values)

    def _seconds(self) -> float:
        return self.position.seconds + time.perf_counter() - self.clock

    def _after_step(self) -> None:
        step = self.position.step
        if self.options.eval_every:
            self._evaluate_if_due()
        if self.stop and not self.ranks.several:  # several agree on it before the next step
            self._save_and_stop()
        if step % self.options.checkpoint_every == 0 and step != self.saved_step:
            self._save()

    def _save(self, *, wait: bool = False) -> None:
        position = self.position
        position.seconds, self.clock = self._seconds(), time.perf_counter()
        position.lines, position.world = self.reporter.lines, self.ranks.world
        whole = with_all_places(position, self.place, self.ranks)
        with self.meter.pausing():
            self.checkpoints.save(self.model, self.optimizer, whole, wait=wait)
        self.saved_step = position.step

    def _save_and_stop(self) -> NoReturn:
        self._save(wait=True)
        number = int(max(self.ranks.gather(self.stop.number)))
        name = "interrupted" if number == signal.SIGINT else "terminated"
        raise Interrupted(
            f"{name} at step {self.position.step}; saved", "go on with the same command and --resume", 128 + number
        )

    # -- evaluating ---------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        """Evaluate after every `eval_every` steps, else when an epoch has just ended; once a step."""
        position, every = self.position, self.options.eval_every
        at_end = position.batches == 0 and position.stream is None
        due = position.step % every == 0 if every else at_end
        if due and position.step and position.step != position.evaluated_step:
            self._evaluate()

    def _evaluate(self) -> None:
        before, self.position.evaluated_step = self.position.evaluated_step, self.position.step
        if self.valid is None:
            return
        try:
            with self.meter.pausing():
                report = self._measure(self.model, subsets=False, ranks=self.ranks)
        except EvaluationStopped:  # after a stop signal; it is done again on resuming
            self.position.evaluated_step = before
            self._save_and_stop()
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
            self._save_model()
        else:
            self.position.evaluations_without_gain += 1
        self._write_line({"valid": report["metrics"]})
        shown = " ".join(f"{key} {number:.4f}" for key, number in report["metrics"].items())
        self.reporter.say(
            f"step {self.position.step}/{self.planned} {self._seconds():.0f} s: "
            f"valid {shown}{' (best)' if better else ''}"
        )

    def _save_model(self) -> None:
        """Write the model to where people look for it."""
        tensors = self.parallel.tensors()
        if self.ranks.first:
            with disk_errors("the model", self.out):
                save(self.model, self.out / "model", tensors)

    def _is_better(self, value: float, loss: float) -> bool:
        """Compare the task's main metric, and where that is equal, as on small validation sets, the loss."""
        best = self.position.best
        if best is None or value == best:
            return best is None or loss < self.position.best_loss
        return value > best if self.task.higher_is_better else value < best

    def _measure(self, model: Model, *, subsets: bool, ranks: Ranks) -> dict[str, Any]:
        data = self.recipe.data
        options = EvalOptions(
            batch_size=max(self.feed.batch_size, 64),
            workers=data.workers,
            subsets=subsets,
            skip=data.on_error == "skip",
            policy=self._policy(),
            precision=self.precision,
            progress=self.reporter.watch,
            batch_tokens=self.options.batch_tokens,
            lengths=self.valid_lengths,
            features=self.valid_features,
            ranks=ranks if ranks.several else None,
            stop=self._stopping if model is self.model else None,
        )
        with self.parallel.whole() if model is self.model else nullcontext():
            return evaluate(model, self.valid, inputs=model.columns.inputs, target=data.target, options=options)

    def _stopping(self) -> bool:
        return self.ranks.sum(bool(self.stop))[0] > 0

    # -- the end ------------------------------------------------------------------------------------------------

    def _finish(self) -> TrainResult:
        """Keep the last state beside the best model, and describe that: results by subset, provenance and card."""
        position, folder = self.position, self.out / "model"
        if self.valid is None:
            self._save_model()
        elif position.evaluated_step != position.step:
            self._evaluate()
        if self.saved_step != position.step:
            self._save()
        self.checkpoints.wait()
        seconds = self._seconds()
        metrics = self._describe(folder, seconds) if self.ranks.first else {}
        self.reporter.say(f"done in {seconds:.0f} s, best at step {position.best_step or position.step}: {folder}")
        if position.skipped:
            self.reporter.say(f"{position.skipped} unreadable rows were skipped")
        if isinstance(self.rows, Stream) and self.rows.skipped:
            self.reporter.say(f"{self.rows.skipped} unreadable shards or rows of the stream were skipped")
        return TrainResult(self.out, folder, metrics, position.step, round(seconds, 3))

    def _describe(self, folder: Path, seconds: float) -> dict[str, Any]:
        """Measure the best model by subset of modalities, and write results, provenance and card beside it."""
        metrics: dict[str, Any] = {}
        if self.valid is not None:
            best = load(folder)
            copy_parameters(best)
            alone = Ranks(device=self.device)
            report = self._measure(best.to(self.device), subsets=True, ranks=alone) | {"data": data_name(self.valid)}
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
            steps=self.position.step,
            seconds=seconds,
            parents=self.position.parents,
            code=self.code,
        )
        with disk_errors("the model", folder):
            write_file(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
            write_file(folder / "README.md", self._card(folder))
        return metrics

    def _card(self, folder: Path) -> str:
        card = self.recipe.card
        known = {"license": card.license, "language": card.language, "datasets": card.datasets}
        return merge_card(folder, read_config(folder), name=self.out.name, metadata=known, summary=card.summary)


def with_all_places(position: Position, start: Any, ranks: Ranks) -> Position:
    """The position with the places of all ranks in a stream, which is what a checkpoint holds."""
    return with_values(position, {"stream": join_states([start, *ranks.gather(position.stream)])})


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


# What a resumed run may change, for it changes no result.
_FREE = {
    "checkpoint_every": 1, "keep": 1, "log_every": 1, "device": "", "parallel": "auto", "cache_gb": 1.0, "profile": 0
}  # fmt: skip
