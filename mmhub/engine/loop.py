"""The training loop: from a recipe to `OUT/model`, stopping cleanly at any step and going on from there bit-exactly."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch

from mmhub.checkpoint import load, read_config, save
from mmhub.config import Recipe, dump_recipe, override_recipe, read_recipe
from mmhub.data.corpus import Corpus
from mmhub.data.sources import Rows
from mmhub.data.stream import Stream, join_states
from mmhub.device import find_device
from mmhub.engine.calibration import calibrate
from mmhub.engine.data import replace as with_values
from mmhub.engine.feed import Turn
from mmhub.engine.profiler import Profiler
from mmhub.engine.provenance import data_facts, provenance
from mmhub.engine.ranks import Ranks, is_lost, join, shared
from mmhub.engine.report import Reporter, TrainRun, run_facts
from mmhub.engine.setup import Setup, check_out
from mmhub.engine.signals import StopSignal
from mmhub.engine.stages import Finished, Stage, train_stages
from mmhub.engine.state import Position
from mmhub.engine.step import Stepper, is_out_of_memory
from mmhub.errors import InputError, Interrupted, MmhubError
from mmhub.evaluation import EvalOptions, EvaluationStopped, data_name, evaluate
from mmhub.files import disk_errors, write_file
from mmhub.hub.card import merge_card
from mmhub.hub.statements import KINDS as STATEMENTS
from mmhub.hub.statements import overlap_line
from mmhub.lineage import code_state
from mmhub.metrics import flat
from mmhub.model import Model
from mmhub.overlap import training_overlap
from mmhub.perplexity import measure_corpus, read_corpus
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
    Stages are trained one after the other, each in a run folder of its own below `out`, and the result counts all.

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
    resume = resume or any(ranks.gather(restarted))
    quiet = quiet or not ranks.first

    def run(recipe: Recipe, out: Path, stage: Stage | None = None) -> TrainResult:
        setup = Setup(recipe, out, folder, ranks, resume=resume, quiet=quiet, stage=stage)
        return _Run(setup, out, code, quiet=quiet).train()

    try:
        code = code_state(folder or Path.cwd())
        if not recipe.train.stages:
            return run(recipe, out)
        begin = partial(check_out, resume=resume)
        return train_stages(
            recipe, out, folder, ranks, resume=resume, begin=begin, run=lambda one: run(one.recipe, one.folder, one)
        )
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise shared(MmhubError("another process of this run has ended", "what it said itself tells why")) from None


class _Run:
    """One run, from its first step to the finished model folder."""

    def __init__(self, setup: Setup, out: Path, code: Mapping[str, Any] | None, *, quiet: bool) -> None:
        self.setup, self.out, self.code, self.quiet = setup, out, code, quiet
        self.recipe, self.options, self.task, self.ranks = setup.recipe, setup.options, setup.task, setup.ranks
        self.rows, self.valid, self.model, self.position = setup.rows, setup.valid, setup.model, setup.position
        self.feed, self.meter, self.checkpoints = setup.feed, setup.meter, setup.checkpoints
        self.stage, self.home = setup.stage, setup.stage.home if setup.stage else out
        self.place = self.position.stream  # where the run was resumed, for ranks that have had no batch since
        self.planned, self.batches_per_epoch = self.feed.steps(), self.feed.batches()
        self.saved_step = self.position.step if setup.restored else -1
        self.valid_texts: Corpus | None = None
        self.told = False  # whether the meter's problem was
        self.fresh = not (out.is_dir() and any(out.iterdir()))
        self.ranks.barrier()  # none makes the folder before all have looked
        try:
            self._begin()
        except BaseException:
            self._forget_if_empty()
            raise

    def _begin(self) -> None:
        """Make the run folder, and whatever writes into it."""
        if self.ranks.first:
            with disk_errors("the run", self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                write_file(self.out / "recipe.toml", dump_recipe(self.setup.resolved))
        self.ranks.barrier()
        run = TrainRun(self.out, msgspec.to_builtins(self.setup.resolved), self.planned)
        with disk_errors("the run", self.out):
            self.reporter = Reporter(
                run,
                quiet=self.quiet,
                step=self.position.step,
                lines=self.position.lines,
                ranks=self.ranks,
                facts=run_facts(self.model, self.ranks.device, self.setup.precision, self.ranks, self.rows, self.valid),
            )
        self.stop = StopSignal(self.reporter.say_from_signal)
        self.profiler = Profiler(self.out, self.options.profile, self.ranks.device, self.ranks.rank)
        self.stepper = Stepper(
            self.recipe,
            self.model,
            self.setup.optimizer,
            self.setup.parallel,
            self.ranks,
            self.setup.precision,
            self.meter,
            self.planned,
            self.setup.stand_in,
            self.rows.where,
            self.reporter.say,
            self.feed.most_rows,
            self.setup.mixer,
            self.setup.averages,
        )
        self._announce()

    def _announce(self) -> None:
        known = {id(p): p for part in self.model.parts().values() for p in part.parameters()}.values()  # tied ones once
        count, trained = (sum(p.numel() for p in known if p.requires_grad or every) for every in (True, False))
        dtype = "bf16" if self.setup.precision == torch.bfloat16 else "fp32"
        rows = (
            f"{self.setup.data.count} rows" if self.setup.data.count is not None else f"streaming '{self.rows.source}'"
        )
        several = f" x {self.ranks.world} ({self.options.parallel})" if self.ranks.several else ""
        what = self.stage.title if self.stage else self.task.name
        self.reporter.say(
            f"{what}: {rows}, {count:,} parameters ({trained:,} trained), "
            f"{self.planned} steps on {self.ranks.device.type}{several} in {dtype}"
        )
        if self.setup.restored:
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
            self._close()

    def _close(self) -> None:
        with ExitStack() as closing:
            closing.callback(self._forget_if_empty)
            for part in (self.checkpoints, self.reporter, self.profiler):
                closing.callback(part.close)

    def _forget_if_empty(self) -> None:
        """A run that failed before its first step leaves nothing, so that the mended recipe can be run as it is."""
        kept = self.position.step or (self.out / "checkpoints").exists() or (self.home / "model").exists()
        if kept or not self.fresh or not self.ranks.first or not self.out.is_dir():
            return
        for path in self.out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.out.rmdir()

    def _epochs(self) -> None:
        self._evaluate_if_due()
        while self.position.epoch < self.options.epochs and not self._done():
            self._epoch()
            if self._done():
                return
            if not self.position.step:
                count = "" if self.setup.data.count is None else f"{self.setup.data.count} "
                raise InputError(f"none of the {count}training rows could be read", "check the data")
            self.position.epoch, self.position.batches, self.position.stream = self.position.epoch + 1, 0, None
            self._evaluate_if_due()

    def _epoch(self) -> None:
        self.checkpoints.wait()  # decoding processes are forked now, which is safe from one thread alone
        turns = self.feed.turns(self.position)
        while not self._done():
            turn = self._next(turns)
            batches = [batch for batch in turn.batches if batch] if turn else []
            own, short = sum(batch.weight for batch in batches), sum(batch.shortened for batch in batches)
            facts = (turn is not None, bool(turn and turn.error), len(turn.skipped) if turn else 0, bool(self.stop))
            total, shortened, going, failed, skipped, stopped = self.ranks.sum(own, short, *facts)
            if failed:
                raise self._shared_error(turn)
            if stopped:
                self._save_and_stop()
            if not going:
                return
            if skipped:
                self._tell_skipped(turn)
            if shortened and isinstance(self.rows, Stream):  # of other rows it is known, and told, from the start
                self._tell_shortened(int(shortened))
            if total:
                self._step(turn or Turn(), total)
            self._advance(turn)
            self._after_step()

    def _next(self, turns: Iterator[Turn]) -> Turn | None:
        with self.meter.waiting():
            try:
                return next(turns, None)
            except MmhubError as error:  # a shard that cannot be read, a decoding process that is gone
                return Turn(error=error)

    def _advance(self, turn: Turn | None) -> None:
        if turn:
            self.position.batches, self.position.stream = turn.count, turn.stream

    def _last_step(self) -> float:
        return self.options.max_steps or math.inf

    def _done(self) -> bool:
        patience = self.options.patience
        tired = patience > 0 and self.position.evaluations_without_gain >= patience
        return self.position.step >= self._last_step() or tired

    def _shared_error(self, turn: Turn | None) -> MmhubError:
        """The error of the first rank that has one, on all ranks alike."""
        own = turn.error if turn else None
        if own and not self.ranks.several:
            return own
        found = self.ranks.gather([own.message, own.hint, own.exit_code] if own else None)
        message, hint, code = next(error for error in found if error)
        error = MmhubError(message, hint)
        error.exit_code = code
        return shared(error)

    def _tell_skipped(self, turn: Turn | None) -> None:
        for texts in self.ranks.gather(turn.skipped if turn else []):
            for text in texts:
                self.position.skipped += 1
                self.reporter.say(f"skipped: {text}")

    def _tell_shortened(self, count: int) -> None:
        if not self.position.shortened:
            self.reporter.say("some conversations are longer than what is read at once: their last turns are left out")
        self.position.shortened += count

    def _step(self, turn: Turn, total: float) -> None:
        rate = self.stepper.rate(self.position.step)
        loss, norm = self.stepper.take(turn, total, self.position)
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
        position.lines = self.reporter.lines
        whole = with_all_places(position, self.place, self.ranks)
        with self.meter.pausing():
            averages = self.setup.averages.tensors if self.setup.averages else None
            self.checkpoints.save(self.model, self.setup.optimizer, whole, averages=averages, wait=wait)
        self.saved_step = position.step

    def _save_and_stop(self) -> NoReturn:
        self._save(wait=True)
        self._stop(f"at step {self.position.step}" + (f" of {self.stage.title}" if self.stage else ""))

    def _stop(self, where: str) -> NoReturn:
        number = int(max(self.ranks.gather(self.stop.number)))
        name = "interrupted" if number == signal.SIGINT else "terminated"
        raise Interrupted(f"{name} {where}; saved", "go on with the same command and --resume", 128 + number)

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
                report = self._measure(self.model, whole=False, ranks=self.ranks)
        except EvaluationStopped:  # after a stop signal; it is done again on resuming
            self.position.evaluated_step = before
            self._save_and_stop()
        loss = report["metrics"].get("loss", 0.0)
        value = report["metrics"].get(self.task.monitor, loss)  # what is measured of written texts waits for the end
        if not math.isfinite(report["metrics"].get("loss", 0.0)):
            raise MmhubError(
                f"the validation loss is {report['metrics']['loss']} at step {self.position.step}",
                "what was saved before is kept; lower train.learning_rate",
            )
        better = self._is_better(value, loss)
        if better:
            gained = value != self.position.best  # a lower loss at the same value does not renew the patience
            self.position.evaluations_without_gain = 0 if gained else self.position.evaluations_without_gain + 1
            self.position.best, self.position.best_loss, self.position.best_step = value, loss, self.position.step
            self._save_model()
        else:
            self.position.evaluations_without_gain += 1
        self._write_line({"valid": flat(report["metrics"])})
        shown = " ".join(f"{key} {value:.4f}" for key, value in flat(report["metrics"]).items())
        self.reporter.say(
            f"step {self.position.step}/{self.planned} {self._seconds():.0f} s: "
            f"valid {shown}{' (best)' if better else ''}"
        )

    def _save_model(self) -> None:
        """Write the model to where people look for it."""
        with self._averaged():
            tensors = self.setup.parallel.tensors()
            if self.ranks.first:
                with disk_errors("the model", self.out):
                    save(self.model, self.home / "model", tensors)

    def _averaged(self) -> AbstractContextManager[None]:
        """Let the model hold the averages of its weights, if they are kept."""
        return self.setup.averages.applied() if self.setup.averages else nullcontext()

    def _is_better(self, value: float, loss: float) -> bool:
        """Compare the task's main metric, and where that is equal, as on small validation sets, the loss."""
        best = self.position.best
        if best is None or value == best:
            return best is None or loss < self.position.best_loss
        return value > best if self.task.higher_is_better else value < best

    def _measure(self, model: Model, *, whole: bool, ranks: Ranks) -> dict[str, Any]:
        """Measure on the validation rows; `whole`: by subset of modalities, and with written answers, too."""
        data = self.recipe.data
        if ranks.several or model is self.model:
            self.checkpoints.wait()  # decoding processes are forked, as in `_epoch`
        options = EvalOptions(
            batch_size=math.ceil(max(self.feed.batch_size, 64) / self.position.pieces),
            workers=data.workers,
            subsets=whole,
            write=whole,
            document=self.setup.data.document if self.task.reads_text else "",
            skip=data.on_error == "skip",
            policy=self.setup.policy,
            precision=self.setup.precision,
            progress=self.reporter.watch,
            batch_tokens=self.options.batch_tokens,
            lengths=self.setup.valid_lengths,
            features=self.setup.valid_features,
            ranks=ranks if ranks.several else None,
            stop=self._stopping if model is self.model else None,
        )
        try:
            with ExitStack() as held:
                if model is self.model:
                    held.enter_context(self._averaged())
                    held.enter_context(self.setup.parallel.whole())
                if self.task.reads_text and model is self.model:
                    return measure_corpus(model, self._valid_texts(options), options)
                inputs, target = model.columns.inputs, self.setup.data.target
                return evaluate(model, self.valid, inputs=inputs, target=target, options=options)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size = f"{options.batch_size} rows"
            raise MmhubError(
                f"out of memory in an evaluation with batches of {size}", "lower train.batch_size"
            ) from None

    def _valid_texts(self, options: EvalOptions) -> Corpus:
        """The validation texts of a language model, read once."""
        if self.valid_texts is None:
            assert self.valid is not None
            self.valid_texts = read_corpus(self.model, self.valid, self.model.columns.inputs["text"], options)
        return self.valid_texts

    def _stopping(self) -> bool:
        return self.ranks.sum(bool(self.stop))[0] > 0

    # -- the end ------------------------------------------------------------------------------------------------

    def _finish(self) -> TrainResult:
        """Keep the last state beside the best model, and describe that: results by subset, provenance and card."""
        position, folder = self.position, self.home / "model"
        if self.valid is None:
            self._save_model()
        elif position.evaluated_step != position.step:
            self._evaluate()
        if self.saved_step != position.step:
            self._save()
        self.checkpoints.wait()
        seconds = self._seconds()
        last = self.stage is None or self.stage.last
        metrics = self._describe(folder, seconds) if self.ranks.first and last else {}
        self.reporter.say(f"done in {seconds:.0f} s, best at step {position.best_step or position.step}: {folder}")
        if position.skipped:
            self.reporter.say(f"{position.skipped} unreadable rows were skipped")
        if position.shortened:
            self.reporter.say(f"{position.shortened} times the last turns of a conversation were left out")
        (skipped,) = self.ranks.sum(self.rows.skipped if isinstance(self.rows, Stream) else 0)
        if skipped:
            self.reporter.say(f"{skipped:.0f} unreadable shards or rows of the stream were skipped")
        if self.stage and not last:
            self._end_stage(self.stage, seconds)
        return TrainResult(self.out, folder, metrics, position.step, round(seconds, 3))

    def _end_stage(self, stage: Stage, seconds: float) -> None:
        """Mark a stage as done; a stop signal that came too late for its last step is heeded before the next."""
        if self.ranks.first:
            stage.finish(self._came_to(stage, seconds))
        if self._stopping():
            self._stop(f"after {stage.title}")

    def _came_to(self, stage: Stage, seconds: float) -> Finished:
        position = self.position
        return Finished(
            name=stage.name,
            parts=list(stage.parts),
            steps=position.step,
            best_step=position.best_step or position.step,
            seconds=round(seconds, 1),
            data=data_facts(self.rows, self.valid),
            parents=position.parents,
        )

    def _describe(self, folder: Path, seconds: float) -> dict[str, Any]:
        """Measure the best model by subset of modalities, and write results, provenance and card beside it."""
        metrics: dict[str, Any] = {}
        if self.valid is not None:
            best = load(folder)
            copy_parameters(best)
            alone = Ranks(device=self.ranks.device)
            best.to(self.ranks.device)
            if getattr(best.decoder, "calibrates", False):
                temperature = calibrate(best, lambda: self._measure(best, whole=False, ranks=alone))
                self.reporter.say(f"calibrated: logits are divided by {temperature:.3f}")
                best.save(folder)
            report = self._measure(best, whole=True, ranks=alone) | {"data": data_name(self.valid)}
            report.pop("name")
            metrics = report["metrics"]
            with disk_errors("the model", folder):
                (folder / "eval").mkdir(exist_ok=True)
                write_file(folder / "eval" / f"{self.task.name}.json", json.dumps(report, indent=2) + "\n")
        stages = [*self.stage.done, self._came_to(self.stage, seconds)] if self.stage else []
        facts = provenance(
            self.stage.whole if self.stage else self.recipe,
            self.model,
            self.rows,
            self.valid,
            steps=sum(one.steps for one in stages) or self.position.step,
            seconds=sum(one.seconds for one in stages) or seconds,
            parents=self.position.parents,
            code=self.code,
            stages=[one.facts() for one in stages],
        )
        if self.valid is not None:
            facts["overlap"] = {"valid": self._overlap(self.valid)}
        said = {key: getattr(self.recipe.card, key) for key in ("summary", *STATEMENTS)}
        facts |= {"card": known} if (known := {key: text for key, text in said.items() if text}) else {}
        with disk_errors("the model", folder):
            write_file(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
            write_file(folder / "README.md", self._card(folder))
        return metrics

    def _overlap(self, valid: Rows) -> dict[str, Any]:
        """How many of the validation rows were trained on, in any stage."""
        inputs, document = dict(self.model.columns.inputs), self.setup.data.document
        found = training_overlap(self._trained_on(), valid, inputs, document=document, policy=self.setup.policy)
        if found.get("exact"):
            self.reporter.say(overlap_line(found))
        return found

    def _trained_on(self) -> Iterator[Rows | Stream]:
        yield self.rows
        for data in self.stage.other_data(self.task, self.setup.folder) if self.stage else ():
            yield data.rows

    def _card(self, folder: Path) -> str:
        card = self.recipe.card
        known = {"license": card.license, "language": card.language, "datasets": card.datasets}
        return merge_card(folder, read_config(folder), name=self.home.name, metadata=known, summary=card.summary)


def with_all_places(position: Position, start: Any, ranks: Ranks) -> Position:
    """The position with the places of all ranks in a stream, which is what a checkpoint holds.

    `start` is the place the run was resumed from; a rank that has had no batch since has none of its own.
    """
    own = None if position.stream is start else position.stream
    places = [place for place in [start, *ranks.gather(own)] if place and place["epoch"] == position.epoch]
    return with_values(position, {"stream": join_states(places)})
