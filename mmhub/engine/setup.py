"""Everything a run needs before its first step: checked, built or restored, and shared out over the processes."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from mmhub.batch import Batch
from mmhub.build import add_guards, build_model
from mmhub.checkpoint import load
from mmhub.config import Recipe, read_recipe
from mmhub.data.corpus import Corpus, documents
from mmhub.data.lengths import Lengths, measure_rows, measure_talks
from mmhub.data.loader import Collate
from mmhub.data.sources import Rows
from mmhub.data.stream import Stream
from mmhub.data.talks import LongTalk, TalkReader
from mmhub.device import find_precision
from mmhub.engine.averages import Averages
from mmhub.engine.compute import prepare_model
from mmhub.engine.data import TrainingData, resolved, with_base_columns
from mmhub.engine.data import replace as with_values
from mmhub.engine.features import open_features, show_progress
from mmhub.engine.feed import AUTO_ROWS, Feed, stand_in, stand_in_items
from mmhub.engine.language_feed import LanguageFeed, block_size, stand_in_text
from mmhub.engine.meter import Meter
from mmhub.engine.mixing import make_mixer
from mmhub.engine.optimizer import make_optimizer
from mmhub.engine.parallel import Parallel
from mmhub.engine.ranks import Ranks, shared
from mmhub.engine.stages import Stage, same_begun
from mmhub.engine.state import Checkpoints, Position
from mmhub.errors import InputError, MmhubError, UsageError
from mmhub.interfaces import Policy, find_task
from mmhub.model import Model
from mmhub.weights import copy_parameters

# What a resumed run may change, for it changes no result.
_FREE = {
    "checkpoint_every": 1, "keep": 1, "log_every": 1, "device": "", "parallel": "auto", "cache_gb": 1.0, "profile": 0
}  # fmt: skip


_LOOKED_AT = 1000  # rows of a stream that are looked at for an item of a modality


class Setup:
    """The parts of a run by name; nothing is written yet.

    Attributes:
        recipe, resolved: as given, and with absolute paths. data: rows and columns. restored: a checkpoint was read.
        position: how far the run has come. model, optimizer, parallel, meter, feed, checkpoints: what trains it,
            and mixer, averages where it mixes pictures and averages weights.
        stand_in: for a rank without rows, on several. valid_lengths, valid_features: of the validation rows.
        stage: where the run is one of several.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        folder: Path | None,
        ranks: Ranks,
        *,
        resume: bool,
        quiet: bool,
        stage: Stage | None = None,
    ) -> None:
        self.stage = stage
        self.recipe = with_base_columns(recipe, out, folder, resume=resume) if stage is None else recipe
        self.folder = folder
        self.resolved = resolved(self.recipe, folder)
        if (noise := self.resolved.data.noise) and not Path(noise).is_dir():
            raise UsageError(f"data.noise: no folder '{noise}'", "name one relative to the recipe")
        self.ranks, self.device, self._quiet = ranks, ranks.device, quiet
        self.task, self.options = find_task(recipe.task), recipe.train
        sizes = [one.train.batch_size for one in (stage.recipes if stage is not None else [recipe])]
        if "auto" in sizes and (ranks.several or self.task.reads_text):
            what = "one process" if ranks.several else "rows of their own, not for blocks of text"
            raise UsageError(f'train.batch_size = "auto" is for {what}', "give a number of rows")
        self.precision = find_precision(recipe.train.precision, self.device)
        if ranks.first:
            check_out(out, self.resolved, resume=resume)
        ranks.barrier()
        self.data = TrainingData(self.recipe, self.task, folder)
        self.rows, self.valid = self.data.rows, self.data.valid
        self.checkpoints = Checkpoints(out / "checkpoints", self.options.keep, ranks)
        state = self.checkpoints.newest(_warn) if resume else None
        self.restored = state is not None
        self._fingerprint = self.data.fingerprint()
        self.position = self.checkpoints.load_position(state) if state else self._start()
        self._check_rows()
        self._build(state)
        self.feed = self._feed()
        self._check_agreement()

    @property
    def policy(self) -> Policy:
        return Policy(urls=self.recipe.data.allow_urls, noise=self.resolved.data.noise)

    def _start(self) -> Position:
        return Position(rows=self.data.count or 0, fingerprint=self._fingerprint)

    def _check_rows(self) -> None:
        """A resumed run must read the same data."""
        hint = "restore the data, or start a new run with another --out"
        if self.position.rows != (self.data.count or 0):
            raise UsageError(
                f"the training data has {self.data.count} rows, and {self.position.rows} when this run was started",
                hint,
            )
        if self.position.fingerprint != self._fingerprint:
            raise UsageError(f"'{self.rows.source}' has changed since this run was started", hint)

    def _check_agreement(self) -> None:
        """All processes must have derived the same batches and vocabularies, or rows would be lost without a word."""
        if not self.ranks.several:
            return
        digest = hashlib.sha256(self.feed.digest())
        for processor in self.model.processors.values():
            for content in processor.files().values():
                digest.update(content)
        if len({*self.ranks.gather(digest.hexdigest())}) > 1:
            raise shared(MmhubError("the processes read different data", "every machine must see the same files"))

    def _build(self, state: Path | None) -> None:
        """Build or restore the model, put it on its device and on all ranks, and make its optimizer."""
        self.model = self._model(state)
        if not state:
            self.position.parents = self.model.parents
        self.model.unimodal_loss = self.options.unimodal_loss
        self.mixer = make_mixer(self.model, self.options)
        self.model.to(self.device)
        prepare_model(self.model, self.options, self.device, self.precision)
        self._features, self.valid_features = self._frozen(self.rows, True), self._frozen(self.valid, False)
        self._lengths, self.valid_lengths = self._lengths_of(self.rows, True), self._lengths_of(self.valid, False)
        self.meter = Meter(self.model, self.device, self.ranks, self.precision)
        self.stand_in = self._stand_in() if self.ranks.several else None
        if self.model.converses and not self.ranks.several:
            self._take_part()
        if self.stand_in is not None:
            self.meter.measure(self.stand_in)
        self.parallel = Parallel(self.model, self.options, self.ranks, self.precision)
        if self.stand_in is not None:
            self.parallel.prepare(self.stand_in)
        self.optimizer = make_optimizer(self.model, self.recipe, self.device)
        self.averages = Averages(self.model, self.options.ema) if self.options.ema else None
        if state:
            averages = self.averages.tensors if self.averages else None
            self.checkpoints.load_tensors(state, self.model, self.optimizer, averages)

    def _lengths_of(self, rows: Any, training: bool) -> Lengths | None:
        if not isinstance(rows, Rows) or self.task.reads_text:
            return None
        if not self.model.converses:
            return self._measure_rows(rows)
        reader = self._reader(training)
        lengths = measure_talks(rows, reader)
        self._tell_long(rows, lengths, reader)
        return lengths

    def _reader(self, training: bool) -> TalkReader:
        """What reads rows as conversations: in training they lose their last turns where they are too long, and where
        answers are compared their first."""
        decoder: Any = self.model.decoder
        wanted = self.options.block_size
        limit = block_size(wanted, decoder) if wanted else decoder.context or 0
        inputs, target = dict(self.model.columns.inputs), self.data.target
        limit = limit if training else decoder.context or 0
        return TalkReader.of(self.model, inputs, target, self.policy, limit=limit, newest=training)

    def _tell_long(self, rows: Rows, lengths: Lengths, reader: TalkReader) -> None:
        """Say what has become of conversations that are too long.

        Raises:
            InputError: one is so with a single turn, unless such rows are skipped.
        """
        assert lengths.talks is not None
        shortened, too_long = lengths.talks.shortened, lengths.talks.too_long
        if too_long and self.recipe.data.on_error == "stop":
            number, error = too_long[0], LongTalk(*lengths.talks.problem)
            error.row, error.modality = 0, "text"
            raise shared(replace(self._collate(), rows=rows).explain(error, [(number, {})]))
        if shortened or too_long:
            what = f"{shortened + len(too_long)} of {len(rows)} conversations are longer than {reader.limit} tokens"
            left = f"the {'last' if reader.newest else 'first'} turns of {shortened} are left out"
            skipped = f", and {len(too_long)} with a single turn are skipped" if too_long else ""
            self._say(f"{what}: {left}{skipped}")

    def _model(self, state: Path | None) -> Model:
        if state is not None:
            model = self.checkpoints.load_model(state)
        elif self.stage is not None and self.stage.start is not None:
            model = load(self.stage.start)
            model.parents = self.stage.parents
            copy_parameters(model)
            self.stage.check(model)  # what has not begun may have been changed
            self.data.check_targets(model)
        else:
            model = self._built()
        for modality, part in self.recipe.model.encoders.items():
            if part.freeze:
                model.freeze(modality)
        if self.recipe.model.decoder is not None and self.recipe.model.decoder.freeze:
            model.decoder.requires_grad_(False)
        if self.stage is not None:
            self.stage.hold(model)
        return model

    def _built(self) -> Model:
        """The model as it is before any training; what stages have data of their own is read for all of them."""
        others = self.stage.other_data(self.task, self.folder) if self.stage is not None else []

        for data in others:
            data.check_talks()

        def joined(name: str) -> Iterable[Any]:
            return chain(*(data.values(name) for data in (self.data, *others)))

        try:
            model = build_model(
                self.task,
                self.recipe.model,
                joined if others else self.data.values,
                columns=self.data.columns,
                folder=self.folder,
                seed=self.recipe.seed,
            )
        except InputError as error:
            if error.row is None or error.modality:
                raise
            raise self.data.at_target(error.row, error) from None
        copy_parameters(model)
        add_guards(model, self.recipe.guards, self.folder)
        for data in (self.data, *others):
            data.check_targets(model)
        if self.stage is not None:
            self.stage.check(model)
        return model

    def _collate(self) -> Collate:
        return Collate(
            rows=self.rows,
            processors=self.model.processors,
            inputs=dict(self.model.columns.inputs),
            decoder=self.model.decoder,
            target=self.data.target,
            policy=self.policy,
            skip=self.recipe.data.on_error == "skip",
            talks=self._reader(True) if self.model.converses else None,
        )

    def _feed(self) -> Feed:
        """What this rank trains on."""
        collate = replace(self._collate(), features=self._features)
        if self.task.reads_text:
            feed = LanguageFeed(self.recipe, self.rows, collate, self._measure_rows, None, self.ranks)
            feed.decoder = self.model.decoder
            if feed.decoder.stateful and feed.batch_size < self.ranks.world:
                problem = f"batches of {feed.batch_size} rows leave some of {self.ranks.world} processes without a text"
                raise shared(UsageError(problem, "raise train.batch_size, or start fewer processes"))
            feed.corpus = self._corpus()
            return feed
        if self._lengths is not None:
            collate = replace(collate, read=self._lengths.read, scripts=self._lengths.talks)
        return Feed(self.recipe, self.rows, collate, self._measure_rows, self._lengths, self.ranks)

    def _corpus(self) -> Corpus | None:
        """The training texts as token ids, read once; None for a stream."""
        decoder: Any = self.model.decoder
        block_size(self.options.block_size, decoder)
        if isinstance(self.rows, Stream):
            if decoder.stateful:
                hint = "leave data.stream out: the corpus is kept as 4 bytes a token, in a file if it is large"
                raise UsageError("a recurrent language model trains on documents in order, and a stream has none", hint)
            return None
        skipped: list[str] = []
        skip, column = self.recipe.data.on_error == "skip", self.model.columns.inputs["text"]
        texts = documents(self.rows, column, self.data.document, skipped if skip else None)
        where = self.rows.where
        corpus = Corpus.read(texts, decoder.processor, self.policy, where=where, skip=skip, skipped=skipped)
        for text in skipped:
            self._say(f"skipped: {text}")
        self._say(corpus.describe())
        return corpus

    def _measure_rows(self, rows: Any) -> Lengths:
        """Measure rows, and read once what is small; of all inputs, so that no cache decides what a batch is."""
        model, folder = self.model, None if isinstance(self.rows, Rows) else self.rows.folder
        if model.converses:
            return measure_talks(rows, self._reader(True), folder)
        inputs = dict(model.columns.inputs)
        pairs = self.model.decoder.paired and len(inputs) == 1
        return measure_rows(rows, model.processors, model.readers, inputs, self.policy, folder=folder, pairs=pairs)

    def _frozen(self, rows: Any, training: bool) -> dict[str, Any]:
        if rows is None or not self.model.frozen & {*self.model.encoders} or not self.options.cache_features:
            return {}
        if self.model.decoder.marks_words or self.model.decoder.points:
            return {}  # features are kept without the places of words
        if self.model.decoder.paired and len(self.model.encoders) == 1:
            return {}  # a row's two inputs are told apart as items
        reason = "rows of a stream pass once" if not isinstance(rows, Rows) else ""
        if not reason and training and self._seen_rows() < len(rows):
            reason = "this run does not see every row"
        if reason:
            self._say(f"features of frozen encoders are not kept: {reason}")
            return {}
        return open_features(
            self.model,
            rows,
            dict(self.model.columns.inputs),
            policy=self.policy,
            skip=self.recipe.data.on_error == "skip",
            training=training,
            precision=self.precision,
            limit_gb=self.options.cache_gb,
            workers=self.recipe.data.workers,
            ranks=self.ranks,
            say=self._say,
            progress=None if self._quiet else show_progress,
        )

    def _seen_rows(self) -> float:
        """How many rows a run with `max_steps` looks at, at most."""
        options = self.options
        rows = math.inf if options.batch_tokens else AUTO_ROWS if options.batch_size == "auto" else options.batch_size
        return options.max_steps * rows * options.accumulate if options.max_steps else math.inf

    def _stand_in(self) -> Batch:
        """A batch for when this rank has none, and in the model an item of each modality for when it has none."""
        if self.task.reads_text:
            return stand_in_text().to(self.device)
        examples = stand_in_items(self._collate(), self.rows)
        if self.model.converses:
            for name in (name for name in self.model.encoders if name not in {*examples, *self.model.frozen}):
                self.model.freeze(name)
                self._say(f"no training row has any {name}: its encoder is frozen")
        known = {name: items.to(self.device) for name, items in examples.items()}
        self.model.stand_ins = {name: items for name, items in known.items() if name not in self._features}
        batch = stand_in(replace(self._collate(), features=self._features), self.rows)
        decoder: Any = self.model.decoder
        return replace(batch, targets=decoder.void(batch.targets) if decoder.paired else batch.targets).to(self.device)

    def _take_part(self) -> None:
        """Let encoders run in every step, as on several ranks: momentum moves weights that have no gradient."""
        collate = self._collate()
        learning = {m: c for m, c in collate.inputs.items() if m in self.model.encoders and m not in self.model.frozen}
        most = _LOOKED_AT if isinstance(self.rows, Stream) else None
        examples = stand_in_items(replace(collate, inputs=learning), self.rows, most)
        self.model.stand_ins = {name: items.to(self.device) for name, items in examples.items()}

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr)


def check_out(out: Path, recipe: Recipe, *, resume: bool) -> None:
    """Check that a run of this recipe, whose paths are absolute, can begin in a folder, or go on there.

    Raises:
        UsageError: it cannot.
    """
    there = next((path for path in (out, *out.parents) if path.exists()), None)
    if there and not there.is_dir():
        raise UsageError(f"'{there}' is a file", "name a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise UsageError(f"the run folder '{out}' exists", "add --resume to go on, or name another with --out")
    stored = out / "recipe.toml"
    if stored.exists():
        _check_same(read_recipe(stored), recipe, out)
    elif out.is_dir() and any(out.iterdir()):
        raise UsageError(f"'{out}' is no run folder, it has no recipe.toml", "name another with --out")


def _check_same(stored: Recipe, recipe: Recipe, out: Path) -> None:
    """A resumed run must be the same run: only what changes no result may differ, and stages that have not begun."""
    for part in ("task", "seed", "model", "data", "train"):
        old, new = getattr(stored, part), getattr(recipe, part)
        if part == "train":
            old, new = (with_values(x, _FREE) for x in (old, new))
            if same_begun(old.stages, new.stages, out):
                new = with_values(new, {"stages": old.stages})
        if part == "data":
            old, new = (with_values(x, {"workers": 0}) for x in (old, new))
        if old != new:
            raise UsageError(
                f"[{part}] differs from the recipe this run in '{out}' was started with",
                "resume with the same recipe, or start a new run with another --out",
            )


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
