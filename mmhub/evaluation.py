"""Measure a model on held-out rows: its task's metrics on all rows and on every subset of the modalities.

Rows of like length are measured together, and shared out where several processes evaluate; neither changes a result.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmhub.batch import Batch, Bundle, Output, begun, only, rows_with
from mmhub.conversation import pack_scripts
from mmhub.data.cells import parts_of
from mmhub.data.lengths import Lengths, measure_rows, measure_talks
from mmhub.data.loader import Collate, Kept, Loaded, load_batches, on_device, worker_count
from mmhub.data.plan import plan_in_order
from mmhub.data.sources import Rows, open_rows, require_columns
from mmhub.data.talks import TalkReader, talk_column
from mmhub.errors import InputError, MmhubError, UsageError
from mmhub.generate.talks import with_stops
from mmhub.generate.write import write as write_texts
from mmhub.interfaces import PairDecoder, Policy, Script, TextDecoder
from mmhub.metrics import explain, measure
from mmhub.metrics.classification import best_labels
from mmhub.model import Model

if TYPE_CHECKING:
    from mmhub.engine.ranks import Ranks


_RIVALS = 1024  # rows among which the loss of pairs is measured


class EvaluationStopped(Exception):
    """`EvalOptions.stop` said so; nothing was measured."""


@dataclass
class Tally:
    """Of one subset of modalities: (row, prediction, reference) of every row in any order, and the loss of batches."""

    answers: list[tuple[int, dict[str, Any] | None, Any]] = field(default_factory=list)  # None: not asked for
    losses: list[tuple[float, float]] = field(default_factory=list)  # of each batch its weight, and that times the loss

    def report(self, metrics: Sequence[str]) -> dict[str, Any]:
        answers = sorted(self.answers, key=_row_of)
        weight = math.fsum(weight for weight, _ in self.losses)
        loss = {"loss": math.fsum(loss for _, loss in self.losses) / weight} if weight else {}
        given = [(one, reference) for _, one, reference in answers if one is not None]
        found = measure(metrics, [one for one, _ in given], [reference for _, reference in given]) if given else {}
        return found | loss


@dataclass(frozen=True)
class Answered:
    """What a model answered to the rows of a data set.

    `answers` are (row, prediction, reference) in row order; `inputs` (modality -> column) and `target` are the columns
    that were read, `policy` bounds their inputs, and `skipped` says of each unreadable row why it was.
    """

    rows: Rows
    inputs: Mapping[str, str]
    target: str
    answers: Sequence[tuple[int, Mapping[str, Any], Any]]
    skipped: Sequence[str]
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class EvalOptions:
    """How to run an evaluation; none of these changes a result.

    A batch has at most `batch_size` rows and `batch_tokens` padded tokens, 0 for no limit. `lengths` are those of the
    rows, if they are known. `stop` is asked between batches whether to end with `EvaluationStopped`. Where `ranks` are
    several, all of them call `evaluate`, and each measures its share. Where answers are texts, `write` says whether
    they are written, which takes long; without, the loss alone is measured. `document`, `window` and `stride` are for
    language models: see `mmhub.perplexity`. `top` is how many of the best labels count as a guess of "top5".
    `details` adds what is no single number, and `keep` is handed the answers to all rows. The loss of pairs is measured
    among 1,024 rows at a time, in the order of the data. Of the modalities in `withhold` no row has any: how much they
    are worth is the difference to an evaluation with them.
    """

    batch_size: int = 64
    batch_tokens: int = 0
    lengths: Lengths | None = None
    workers: int | str = "auto"
    subsets: bool = True
    write: bool = True
    top: int = 5
    details: bool = False
    keep: Callable[[Answered], None] | None = None
    document: str = ""
    window: int = 0
    stride: int = 0
    skip: bool = False
    withhold: tuple[str, ...] = ()
    policy: Policy = field(default_factory=Policy)
    precision: torch.dtype = torch.float32
    features: Mapping[str, Kept] = field(default_factory=dict)  # of these very rows, by the model's frozen encoders
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None
    stop: Callable[[], bool] | None = None
    ranks: Ranks | None = None


def evaluate(
    model: Model | str | os.PathLike[str],
    data: Any,
    *,
    inputs: Mapping[str, str] | None = None,
    target: str = "",
    columns: Sequence[str] = (),
    options: EvalOptions | None = None,
) -> dict[str, Any]:
    """Measure a model, or the model of that name, on `data`.

    `data` is anything a recipe's `data.train` may be, `Rows`, or a list of rows, each a dict of column to value.

    `inputs` (modality -> column), `target` and `columns` default to what the checkpoint was trained with. Returns
    {"name", "task", "rows", "skipped", "metrics", "subsets"}; a subset counts the rows that have all its modalities.
    Conversations, and whatever a language model answers, are each in one subset alone, that of all they have; turns of
    those that are too long for the model are left out, the oldest first, and "shortened" is how many these are. One of
    which nothing is asked without what is withheld counts as skipped.
    With `options.details` there is also "details": see `mmhub.metrics.explain`; "withheld" is what was withheld.

    Raises:
        UsageError: a column is missing. InputError: a row cannot be read (unless `options.skip`).
        EvaluationStopped: `options.stop` said so.
    """
    if isinstance(model, (str, os.PathLike)):
        from mmhub.hub import load

        model = load(model)
    rows = data if isinstance(data, Rows) else open_rows(data, columns=list(columns or model.columns.names) or None)
    options = options or EvalOptions()
    for name in ("document", "window", "stride"):
        if getattr(options, name) and not model.task.reads_text:
            raise UsageError(f"{name!r} is for language models, and this one is for {model.task.name}", "leave it out")
    wanted, target = find_columns(model, rows, inputs, target)
    wanted = _not_withheld(model, wanted, options.withhold)
    if model.task.reads_text:
        return _measure_language(model, rows, wanted["text"], options)
    tallies, skipped, shortened = _run(model, rows, wanted, target, options)
    everything = tallies.pop(())
    if not everything.answers:
        raise InputError(f"none of the {len(rows)} rows could be evaluated", "check the data")
    answers = [(row, one, truth) for row, one, truth in sorted(everything.answers, key=_row_of) if one is not None]
    if options.keep is not None:
        options.keep(Answered(rows, wanted, target, answers, skipped, options.policy))
    found = {
        "name": model.name,
        "task": model.task.name,
        "rows": len(everything.answers),
        "skipped": len(skipped),
        "metrics": everything.report(model.task.metrics),
        "subsets": {
            "+".join(subset): tally.report(model.task.metrics) | {"rows": len(tally.answers)}
            for subset, tally in tallies.items()
            if tally.answers
        },
    }
    found |= {"shortened": shortened} if shortened else {}
    found |= {"withheld": list(options.withhold)} if options.withhold else {}
    if options.details:
        predictions, references = [one for _, one, _ in answers], [truth for _, _, truth in answers]
        found["details"] = explain(model.task.name, predictions, references)
    return found


def _row_of(answer: tuple[int, Any, Any]) -> int:
    return answer[0]


def find_columns(
    model: Model, rows: Rows, inputs: Mapping[str, str] | None, target: str = ""
) -> tuple[dict[str, str], str]:
    """Decide which columns are read: those of the inputs, see `input_columns`, and the target's, "" where none is.

    Raises:
        UsageError: a column is missing, or not known.
    """
    wanted = input_columns(model, rows, inputs)
    if model.task.reads_text:
        if target:
            raise UsageError(f"a language model has no target column, and {target!r} was named", "name none")
        return wanted, ""
    target = target or ("" if "messages" in (inputs or {}) else model.columns.target)
    talks = model.converses and (model.task.converses or "messages" in (inputs or {}))
    if not target and not model.task.paired and not talks:
        raise UsageError("no target column is known", "add --target-column NAME")
    if talks and not target:
        if "text" not in wanted:
            hint = "name it with --inputs messages=COL, or the column of the answers with --target-column"
            raise UsageError("no column of conversations is known", hint)
        talk_column(inputs or {}, wanted["text"])
    require_columns(rows, [target] if target else [], "name the column with --target-column")
    return wanted, target


def input_columns(model: Model, rows: Rows, inputs: Mapping[str, str] | None) -> dict[str, str]:
    """Decide which column feeds which modality: `inputs` first, then what the model was trained with, then its name.

    A modality whose column the table lacks is missing in every row, as long as one is there. "messages" is the column
    of conversations, which hold all of them, and is taken by itself for chat where a model knows no columns.
    """
    given = dict(inputs or {})
    if model.task.converses and not given and not model.columns.inputs and "messages" in rows.columns:
        given = {"messages": "messages"}
    if model.converses and "messages" in given:
        talk_column(given, "messages")
        given = dict.fromkeys(model.modalities, given["messages"])
    unknown = [name for name in given if name not in model.modalities]
    if unknown:
        raise UsageError(f"this model has no input {unknown[0]!r}", f"it takes {', '.join(model.modalities)}")
    require_columns(rows, list(given.values()), "name the columns with --inputs")
    known = {m: model.columns.inputs.get(m, m) for m in model.modalities} | given
    if model.converses and "text" not in {**model.columns.inputs, **given} and model.columns.inputs:
        known.pop("text")  # it was trained without a question, and a column of that name is likely to be the answer
    there = rows.columns
    present = {m: column for m, column in known.items() if set(parts_of(column, there)) <= set(there)}
    if not present:
        require_columns(rows, list(known.values()), "name the columns with --inputs")
    return present


def _not_withheld(model: Model, inputs: dict[str, str], withhold: Sequence[str]) -> dict[str, str]:
    """The inputs that are left.

    Raises:
        UsageError: the model has no such input, or needs it.
    """
    unknown = [name for name in withhold if name not in model.modalities]
    if unknown:
        raise UsageError(
            f"this model has no input {unknown[0]!r} to withhold", f"it takes {', '.join(model.modalities)}"
        )
    if withhold and model.task.paired:
        raise UsageError(f"nothing can be withheld: {model.task.name} is about pairs", "leave it out")
    if not set(model.modalities if model.converses else inputs) - set(withhold):
        raise UsageError(f"without {' and '.join(withhold)} nothing is left to answer from", "withhold less")
    return {name: column for name, column in inputs.items() if model.converses or name not in withhold}


def _measure_language(model: Model, rows: Rows, column: str, options: EvalOptions) -> dict[str, Any]:
    """Measure a language model: perplexity by token, word and byte, and how exactly that was computed."""
    from mmhub.perplexity import measure_rows as measure_texts

    report = measure_texts(model, rows, column, options)
    return {"name": model.name, "task": model.task.name, "subsets": {}} | report


Tallies = dict[tuple[str, ...], Tally]


def _run(
    model: Model, rows: Rows, inputs: Mapping[str, str], target: str, options: EvalOptions
) -> tuple[Tallies, list[str], int]:
    subsets = _subsets_of(model, inputs, options) if options.subsets and not model.task.paired else []
    tallies: Tallies = {subset: Tally() for subset in [(), *subsets]}
    processors = {name: model.processors[name] for name in inputs}
    unread = {name: column for name, column in inputs.items() if name not in options.features}
    pairs = model.decoder.paired and len(inputs) == 1
    reader = None
    if model.converses:
        limit = model.language_model.context or 0
        reader = TalkReader.of(model, inputs, target, options.policy, limit=limit, withhold=options.withhold)
        lengths = options.lengths or measure_talks(rows, reader)
    else:
        lengths = options.lengths or measure_rows(rows, processors, model.readers, unread, options.policy, pairs=pairs)
    collate = Collate(
        rows=rows,
        processors=processors if reader is None else model.processors,
        inputs=inputs,
        decoder=model.decoder,
        target=target,
        policy=options.policy,
        skip=options.skip,
        features={name: kept for name, kept in options.features.items() if name in inputs},  # none that is withheld
        read=lengths.read,
        measured=True,
        talks=reader,
        scripts=lengths.talks,
    )
    order = plan_in_order(len(rows), lengths, batch_size=options.batch_size, batch_tokens=options.batch_tokens)
    share = _Share(order, options.ranks)
    was_training = model.training
    model.eval()
    try:
        skipped = _measure_all(model, share, share.load(collate, model.device, options), tallies, options)
        tallies, skipped = share.gather(tallies, skipped)
        if isinstance(model.decoder, PairDecoder):
            tallies[()].losses = _pair_losses(model.decoder, model.device, tallies[()])
    finally:
        model.train(was_training)
    return tallies, skipped, 0 if lengths.talks is None else lengths.talks.shortened


def _subsets_of(model: Model, inputs: Mapping[str, str], options: EvalOptions) -> list[tuple[str, ...]]:
    if model.converses:
        return _subsets(tuple(name for name in model.modalities if name not in options.withhold))
    found = _subsets(tuple(name for name in model.modalities if name in inputs))
    return [subset for subset in found if set(model.task.required) <= set(subset)]


@torch.inference_mode()
def _pair_losses(decoder: PairDecoder, device: torch.device, tally: Tally) -> list[tuple[float, float]]:
    """The losses of pairs, each row's among `_RIVALS` rows in their order, whatever was computed together."""
    answers = [(one["embeddings"], group) for _, one, group in sorted(tally.answers, key=_row_of) if one is not None]
    found = []
    for start in range(0, len(answers), _RIVALS):
        part = answers[start : start + _RIVALS]
        none = [0.0] * decoder.dim
        vectors = {
            side: torch.tensor([there.get(side, none) for there, _ in part], device=device) for side in decoder.sides
        }
        groups = [group if len(there) == len(decoder.sides) else None for there, group in part]
        targets = decoder.encode_targets(groups)
        weight = float(decoder.weigh(targets).sum())
        if weight:
            found.append((weight, float(decoder.pair_loss(vectors, targets.to(device))) * weight))
    return found


def _measure_all(
    model: Model, share: _Share, parts: Iterator[Loaded], tallies: Tallies, options: EvalOptions
) -> list[str]:
    """Measure this process's batches; return why each row that was skipped was."""
    skipped: list[str] = []
    latest = _nothing(model)  # the latest stands in where there is none
    for turn, part in enumerate(options.progress(parts, share.turns) if options.progress else parts):
        share.check(part.error, options.stop is not None and options.stop())
        own = turn < share.own
        skipped += part.skipped if own else []
        latest = part.batch or latest
        if part.batch is not None and own:
            _measure_batch(model, part.batch, tallies, options, share.several)
        elif share.several:
            unused = {subset: Tally() for subset in tallies}
            _measure_batch(model, latest, unused, options, share.several)
    return skipped


def _nothing(model: Model) -> Batch:
    """A row without any input; as a conversation it is one token, for a language model reads no less."""
    if not model.converses:
        return Batch(items={}, size=1)
    script = Script(torch.zeros(1, dtype=torch.long), torch.zeros(1), prompt=1)
    text, plan, prompts = pack_scripts([script], list(model.encoders))
    return Batch(items={"text": text}, size=1, plan=plan, prompts=prompts).to(model.device)


class _Share:
    """The batches one process measures among all of them, and how the processes keep in step.

    Each makes the same number of model calls, on which sharded weights insist; one without a batch left measures its
    last one again for nothing.
    """

    def __init__(self, order: Sequence[Sequence[int]], ranks: Ranks | None) -> None:
        self.ranks, self.several = ranks, ranks is not None and ranks.several
        first, step = (ranks.rank, ranks.world) if ranks is not None else (0, 1)
        self.batches = list(order[first::step])
        self.own = len(self.batches)
        self.turns = math.ceil(len(order) / step)
        if self.own < self.turns:
            self.batches.append((self.batches or order)[-1])

    def load(self, collate: Collate, device: torch.device, options: EvalOptions) -> Iterator[Loaded]:
        workers = worker_count(options.workers, device)
        cuda = device.type == "cuda"
        return on_device(load_batches(collate, self.batches, workers, pin_memory=cuda), device)

    def check(self, error: InputError | None, stop: bool) -> None:
        """Raise on every process what one of them has met."""
        if self.several:
            assert self.ranks is not None
            stops, errors = self.ranks.sum(float(stop), float(error is not None))
            stop = bool(stops)
            if errors and not stop:
                found = self.ranks.gather([error.message, error.hint] if error else None)
                error = error or InputError(*next(one for one in found if one))
        if stop:
            raise EvaluationStopped
        if error is not None:
            raise error

    def gather(self, tallies: Tallies, skipped: list[str]) -> tuple[Tallies, list[str]]:
        """Join what all processes have measured."""
        if not self.several:
            return tallies, skipped
        assert self.ranks is not None
        own = [skipped, [[tally.answers, tally.losses] for tally in tallies.values()]]
        parts = [json.loads(text) for text in self.ranks.gather(json.dumps(own))]  # unlike msgspec's, with NaN
        joined = {
            subset: Tally(
                [(row, answer, reference) for _, found in parts for row, answer, reference in found[i][0]],
                [loss for _, found in parts for loss in found[i][1]],
            )
            for i, subset in enumerate(tallies)
        }
        return joined, [text for texts, _ in parts for text in texts]


@torch.inference_mode()
def _measure_batch(
    model: Model,
    batch: Batch,
    tallies: Mapping[tuple[str, ...], Tally],
    options: EvalOptions,
    always: bool,
) -> None:
    """Add a batch to the tallies. `always` decodes a subset that no row has as well, and forgets the result."""
    if model.converses:
        _measure_talks(model, batch, tallies, options)
        return
    with torch.autocast(model.device.type, options.precision, enabled=options.precision != torch.float32):
        bundle = model.encode(batch.items, batch.size, batch.features)
        references = model.decoder.references(batch.raw_targets)
        weights = torch.ones(batch.size) if batch.weights is None else batch.weights
        targets = None if isinstance(model.decoder, PairDecoder) else batch.targets  # of pairs, see `_pair_losses`
        known: tuple[Output, Sequence[dict[str, Any] | None]] | None = None  # of all rows with all they have
        for subset, tally in tallies.items():
            keep = rows_with(bundle, subset)
            if not len(keep):
                if always:
                    model.decode(bundle)
                continue
            whole = not subset or (set(subset) == set(bundle) and len(keep) == batch.size)
            part = bundle if whole else only(bundle, subset, keep)
            rows = keep.tolist()
            if whole and known is not None:
                output, answers = known
            else:
                output = model.decode(part, targets if whole else _pick(targets, keep))
                answers = _answers(model, batch, part, output, rows, options)
            if whole and (not always or len(bundle) == 1):  # else processes would make different numbers of calls
                known = output, answers
            if batch.index:
                tally.answers += [
                    (batch.index[i], answer, references[i]) for i, answer in zip(rows, answers, strict=True)
                ]
            weight = float(weights[keep.to(weights.device)].sum())
            if output.loss is not None and weight:
                tally.losses.append((weight, float(output.loss) * weight))


def _measure_talks(model: Model, batch: Batch, tallies: Mapping[tuple[str, ...], Tally], options: EvalOptions) -> None:
    """Add a batch of conversations to the tallies: to that of all, and to that of the modalities each of them holds."""
    decoder = model.language_model
    with torch.autocast(model.device.type, options.precision, enabled=options.precision != torch.float32):
        bundle = model.encode(batch.items, batch.size, batch.features)
        fused = model.fusion(bundle, plan=batch.plan)
        stream = fused["fused"]
        assert stream.loss is not None and batch.prompts is not None
        losses = (decoder.token_losses(fused).double() * stream.loss).sum(1).tolist()
        weights = stream.loss[:, 1:].double().sum(1).tolist()
        texts: list[str | None] = [None] * batch.size
        if options.write:
            asked = bundle | {"text": begun(bundle["text"], batch.prompts.to(model.device))}
            settings = with_stops(decoder, None)
            written = write_texts(decoder, model.fusion(asked, plan=batch.plan), settings, rows=batch.index or None)
            texts = [found[0].text.strip() for found in written]
    if not batch.index:
        return
    held = {name: set(part.rows.tolist()) for name, part in batch.items.items()}
    held |= {name: set(part.rows.tolist()) for name, part in batch.features.items()}
    held["text"] = {row for row, raw in enumerate(batch.raw) if raw["text"]}
    references = model.decoder.references(batch.raw_targets)
    for row, text in enumerate(texts):
        subset = tuple(name for name in model.modalities if row in held.get(name, ()))
        for tally in (tallies[()], tallies.get(subset, Tally()) if subset else Tally()):
            answer = None if text is None else {"text": text}
            tally.answers.append((batch.index[row], answer, references[row]))
            tally.losses.append((weights[row], losses[row]))


def _answers(
    model: Model, batch: Batch, part: Bundle, output: Output, rows: list[int], options: EvalOptions
) -> Sequence[dict[str, Any] | None]:
    """What the model answers to some rows of a batch."""
    if isinstance(model.decoder, TextDecoder):
        if not options.write:
            return [None] * len(rows)
        numbers = [batch.index[row] for row in rows] if batch.index else rows  # what is drawn depends on them
        return [{"text": texts[0].text} for texts in write_texts(model.decoder, model.fusion(part), rows=numbers)]
    raw = [batch.raw[row] for row in rows] if batch.raw else []
    scored = options.details or "top" in model.task.metrics
    return [_slim(one, options) for one in model.answers(replace(batch, raw=raw), output, details=scored)]


def _slim(answer: dict[str, Any], options: EvalOptions) -> dict[str, Any]:
    """An answer without the scores that nothing is computed from: those of all labels may be large."""
    scores = answer.get("scores")
    if isinstance(scores, Mapping) and "label" in answer:
        best = {"top": best_labels(scores, options.top)} if len(scores) > options.top else {}
        return {key: value for key, value in answer.items() if key != "scores"} | best
    return answer


def _subsets(modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [subset for size in range(1, len(modalities) + 1) for subset in combinations(modalities, size)]


def _pick(targets: Any, keep: Tensor) -> Any:
    if targets is None or isinstance(targets, Tensor):
        return None if targets is None else targets[keep]
    raise MmhubError(f"cannot take rows of targets of type {type(targets).__name__}")


def data_name(source: Any) -> str:
    """A short name of a data source for cards and tables: file names without their folders."""
    if isinstance(source, Rows):
        source = source.source
    if isinstance(source, Mapping):
        return ", ".join(Path(str(value)).name for value in source.values())
    if isinstance(source, (list, tuple)):
        return ", ".join(Path(str(value)).name for value in source)
    text = str(source)
    return text if text.startswith("hub:") or not Path(text).exists() else Path(text).name
