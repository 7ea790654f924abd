"""Checks of a decoder: it learns a toy problem, its loss is a mean, and its targets and answers have their form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from mmhub.batch import Output
from mmhub.errors import InputError, MmhubError
from mmhub.interfaces import Stream
from mmhub.testing.catalogue import Check
from mmhub.testing.contract import ContractError, NotApplicableError, expect
from mmhub.testing.standins import rows_of
from mmhub.testing.subject import WIDTH, DecoderSubject, LanguageSubject, WriterSubject, difference, subject_of
from mmhub.testing.toys import Toy

_RULE = "Decoder"
_STEPS = 40


def streams(check: Check) -> None:
    """It reads the streams it `needs`, or, if it names none, `fused` or the only stream there is, of any width, and for
    visual-question-answering several, and for pairs two, or one and its pair; it gives one finite row of logits for
    each row."""
    subject: DecoderSubject = subject_of(check)
    decoder = subject.part()
    if isinstance(subject, LanguageSubject):
        raise NotApplicableError("it reads the text of a sample itself")
    cases = [subject.streams]
    if subject.cls.paired:
        cases += [{"audio": Stream(3), "image": Stream(WIDTH, pooled=5)}, {"text": Stream(WIDTH)}]
    elif not subject.cls.needs:
        cases += [{"image": Stream(WIDTH, pooled=5)}, {"text": Stream(3), "fused": Stream(WIDTH, pooled=WIDTH)}]
        if "visual-question-answering" in subject.cls.tasks:
            cases += [{"image": Stream(WIDTH, pooled=5), "text": Stream(3)}]
    for given in cases:
        if given is not subject.streams:
            decoder = _with_streams(subject, decoder.config, given)
        with torch.no_grad():
            output = decoder(subject.bundle(streams=_with_pair(subject, given)))
        expect(isinstance(output, Output), f"it returns a {type(output).__name__}", "Output", _RULE)
        good = len(output.logits) == 8 and bool(torch.isfinite(output.logits).all())
        expect(good, f"of {sorted(given)}, 8 rows make logits {tuple(output.logits.shape)}", "(8, ...), finite", _RULE)
        expect(output.loss is None, "without targets there is a loss", "None", _RULE)


def batch_invariance(check: Check) -> None:
    """A row alone gives the logits it has in a batch, in order."""
    subject: DecoderSubject = subject_of(check)
    decoder, bundle = subject.part(), subject.bundle()
    with torch.no_grad():
        whole = decoder(bundle).logits
        for row in (0, 3, 7):
            alone = decoder(rows_of(bundle, [row])).logits
            gap = difference({"logits": alone}, {"logits": whole[row : row + 1]})
            expect(not gap, f"alone, row {row}: {gap}", "the logits it has in a batch", "batching")


def loss_decreases(check: Check) -> None:
    """On fixed features that tell the target, 40 steps of AdamW take a tenth off the loss at least, for every task it
    serves that the kit has a toy problem for."""
    subject: DecoderSubject = subject_of(check)
    if isinstance(subject, LanguageSubject):
        _learn_texts(subject)
        return
    for task, toy in _toys(subject):
        decoder = _built(subject, toy)
        bundle, encoded = subject.bundle(), decoder.encode_targets(subject.targets(toy))
        _learn(task, decoder, partial(_training_loss, decoder, bundle, encoded))


def loss_mean(check: Check) -> None:
    """The loss is a number, the mean over the batch: every row twice leaves it as it was."""
    subject: DecoderSubject = subject_of(check)
    if isinstance(subject, LanguageSubject):
        raise NotApplicableError("its loss is a mean over tokens, see the check token-losses")
    if subject.cls.paired:
        raise NotApplicableError("in its loss, rows are compared with each other")
    for task, toy in _toys(subject):
        decoder, targets = _built(subject, toy), subject.targets(toy)
        bundle = subject.bundle()
        loss = decoder(bundle, decoder.encode_targets(targets)).loss
        expect(loss is not None and loss.ndim == 0, f"{task}: the loss is {loss!r}", "a number ()", _RULE)
        once = _loss(decoder, bundle, decoder.encode_targets(targets))
        twice = _loss(decoder, rows_of(bundle, [*range(8), *range(8)]), decoder.encode_targets([*targets, *targets]))
        same = abs(once - twice) <= 1e-4 * max(1.0, abs(once))
        expect(same, f"{task}: the loss is {once:.4g}, and {twice:.4g} with each row twice", "the mean", _RULE)


def predict_schema(check: Check) -> None:
    """`predict` answers one row each, in order, as JSON with the keys of its task, probabilities that sum
    to 1 where they should, and has those keys without `details`, too."""
    subject: DecoderSubject = subject_of(check)
    _is_no_writer(subject)
    for task, toy in _toys(subject):
        decoder, bundle = _built(subject, toy), subject.bundle()
        with torch.no_grad():
            answers = decoder.predict(decoder(bundle))
            brief = decoder.predict(decoder(bundle), details=False)
            alone = [decoder.predict(decoder(rows_of(bundle, [row])))[0] for row in range(8)]
        expect(len(answers) == 8, f"{task}: 8 rows get {len(answers)} answers", "one a row", "predict")
        for answer, short, own in zip(answers, brief, alone, strict=True):
            _check_json(answer)
            toy.check(answer)
            toy.check(short)
            expect(_alike(answer, own), f"{task}: a row is answered {answer}, and {own} alone", "the same", _RULE)


def targets_refused(check: Check) -> None:
    """`encode_targets` refuses a missing or unknown target with an InputError whose `row` tells which."""
    subject: DecoderSubject = subject_of(check)
    for task, toy in _toys(subject):
        decoder = _built(subject, toy)
        good = subject.targets(toy, 2)
        for bad in toy.refused:
            try:
                decoder.encode_targets([*good, bad])
            except InputError as error:
                expect(
                    error.row == 2, f"{task}: for {bad!r} in row 2, the error says row {error.row}", "row = 2", _RULE
                )
            except Exception as error:
                name = type(error).__name__
                raise ContractError(f"{task}: {bad!r} raises {name}; expected an InputError [{_RULE}]") from error
            else:
                expect(False, f"{task}: the target {bad!r} is taken", "an InputError", _RULE)


def references(check: Check) -> None:
    """`references` gives targets in the form of `predict`, so that metrics can compare them."""
    subject: DecoderSubject = subject_of(check)
    _is_no_writer(subject)
    if subject.cls.paired:
        raise NotApplicableError("its answers are vectors, and its targets groups of rows")
    for task, toy in _toys(subject):
        decoder, targets = _built(subject, toy), subject.targets(toy)
        found = decoder.references(targets)
        expect(len(found) == len(targets), f"{task}: {len(targets)} targets give {len(found)}", "one each", _RULE)
        with torch.no_grad():
            answer = decoder.predict(decoder(subject.bundle()))[0][toy.key]
        one, other = type(found[0]).__name__, type(answer).__name__
        expect(one == other, f"{task}: a reference is a {one} and an answer a {other}", "the same type", _RULE)


def _learn(task: str, decoder: Any, loss: Callable[[], Any]) -> None:
    """Train a decoder, and expect its loss in evaluation mode to sink."""

    def now() -> float:
        with torch.no_grad():
            return float(loss())

    before = now()
    optimizer = torch.optim.AdamW(decoder.train().parameters(), lr=1e-2)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    decoder.eval()
    after = now()
    expect(after < 0.9 * before, f"{task}: the loss goes from {before:.3g} to {after:.3g}", "a lower one", _RULE)


def _learn_texts(subject: LanguageSubject) -> None:
    decoder, rows = subject.part(), subject.inputs()
    _learn(subject.task, decoder, lambda: subject.run(decoder, rows)["loss"])


def _is_no_writer(subject: DecoderSubject) -> None:
    """End the check for a decoder whose answers are texts, which the core lets it write."""
    if isinstance(subject, WriterSubject):
        raise NotApplicableError("its answers are texts, see the check step-by-step")


def _with_pair(subject: DecoderSubject, given: Mapping[str, Stream]) -> dict[str, Stream]:
    """The streams of a bundle: of a single one that is compared with itself, its pair as well."""
    if not subject.cls.paired or len(given) > 1:
        return dict(given)
    return dict(given) | {f"{name}_pair": stream for name, stream in given.items()}


def _with_streams(subject: DecoderSubject, config: Any, streams: Any) -> Any:
    if isinstance(subject, WriterSubject):
        return subject.build(config, streams).eval()
    return subject.cls(config, streams).eval()


def _toys(subject: DecoderSubject) -> list[tuple[str, Toy]]:
    """The tasks it serves with their toy problems; if there is none, the check ends."""
    subject.part()
    tasks = () if subject.cls.reads_text else subject.cls.tasks  # what it learns is its text itself
    found = [(task, toy) for task in tasks if (toy := subject.toy(task))]
    if not found:
        raise NotApplicableError(f"the kit has no toy problem for {', '.join(subject.cls.tasks)}")
    return found


def _built(subject: DecoderSubject, toy: Toy) -> Any:
    torch.manual_seed(0)
    try:
        return subject.build(subject.fitted(toy)).eval()
    except MmhubError as error:
        raise ContractError(f"fit does not learn from {subject.targets(toy, 2)}: {error} [{_RULE}]") from error


def _training_loss(decoder: Any, bundle: Any, encoded: Any) -> Any:
    return decoder(bundle, encoded).loss


def _loss(decoder: Any, bundle: Any, encoded: Any) -> float:
    with torch.no_grad():
        return float(_training_loss(decoder, bundle, encoded))


def _alike(one: Any, other: Any) -> bool:
    """Are two answers the same, numbers up to rounding?"""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)
    return bool(one == other)


def _check_json(answer: Any) -> None:
    try:
        json.dumps(answer, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ContractError(f"an answer makes no JSON: {error}; expected plain data [predict]") from error
