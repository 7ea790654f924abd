"""The guard `classifier`: another model, loaded by name, says what must not pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmhub.errors import InputError, MmhubError, UsageError, did_you_mean
from mmhub.guard import current_policy, media_in, texts_of
from mmhub.spec import Refusal
from mmhub_guards.base import Answer, GuardConfig, Sample, Stage, answer_texts

_WINDOW, _SHARED = 1000, 200  # characters of a text that are judged at once, and that neighbours share
_AGAIN = 10.0  # seconds after which a model that could not be loaded is tried again
_failed: dict[tuple[str, str], tuple[float, MmhubError]] = {}
_loaded: dict[tuple[str, str], Any] = {}  # by name and device: once for a process
_lock = threading.RLock()


class ClassifierConfig(GuardConfig, kw_only=True):
    """`model` is the name of a classifier, `labels` the probabilities from which on each of its labels refuses.

    `reads` says what it is shown, "text" or "image". A name that begins with "./" or "../" is beside the file that
    names it, or else from the current folder.
    """

    model: str
    labels: dict[str, float]
    reads: Literal["text", "image"] = "text"
    on: tuple[Stage, ...] = ("input",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model or not self.labels or any(not 0 < value <= 1 for value in self.labels.values()):
            raise ValueError("'model' is a name, and 'labels' has probabilities above 0 and up to 1")
        if self.reads == "image" and self.on != ("input",):
            raise ValueError('answers hold no pictures: with reads = "image", \'on\' is ["input"]')


class Classifier:
    """Refuses what a classifier gives a listed label with at least that probability.

    Texts longer than 1000 characters, or than the classifier reads at once, are judged in pieces that overlap.

    The model is loaded when the first sample comes, once for a process; nobody guards it in turn. Where it cannot be
    had, all is refused.
    """

    Config = ClassifierConfig

    def __init__(self, config: ClassifierConfig, model: Any = None, folder: Path | None = None) -> None:
        self.config, self.name, self.on = config, config.name or "classifier", config.on
        self._model, self._folder = model, folder

    def check(self, sample: Sample) -> str | Refusal:
        """Judge a sample."""
        return self.check_all([sample])[0]

    @property
    def media(self) -> tuple[str, ...]:
        """The media that it reads, and that the guarded model must see as this guard has."""
        return ("image",) if self.config.reads == "image" else ()

    def check_all(self, samples: Sequence[Sample]) -> list[str | Refusal]:
        """Judge several samples in common batches.

        Raises:
            InputError: a picture cannot be read; `row` is the sample's position.
        """
        shown = [list(self._shown(sample)) for sample in samples]
        try:
            found = self._judged(shown)
        except InputError as error:
            error.row = [row for row, part in enumerate(shown) for _ in part][error.row or 0]
            raise
        return [next(filter(None, part), "") for part in found]

    def review(self, sample: Sample, answer: Answer) -> Answer | Refusal:
        """Judge the texts of an answer."""
        (found,) = self._judged([list(answer_texts(answer))])
        return next(filter(None, found), None) or answer

    def _shown(self, sample: Sample) -> Iterator[Any]:
        yield from media_in(sample, "image") if self.config.reads == "image" else texts_of(sample)

    def _judged(self, parts: list[list[Any]]) -> list[list[Refusal | None]]:
        """What is said of each sample's texts, in pieces, or pictures."""
        if not any(parts):
            return [[] for _ in parts]
        with _lock:
            classifier = self._classifier()
            if self.config.reads == "text":
                fits = _fitting(classifier)
                parts = [[piece for text in part for piece in _pieces(text, fits)] for part in parts]
            raws = [raw for part in parts for raw in part]
            answers = classifier.predict([{self.config.reads: raw} for raw in raws], policy=current_policy())
        found = iter([self._refusal(answer) for answer in answers])
        return [[next(found) for _ in part] for part in parts]

    def _refusal(self, answer: Mapping[str, Any]) -> Refusal | None:
        scores = answer.get("scores") or {answer["label"]: answer["score"]}
        for label, least in self.config.labels.items():
            if not scores.get(label, 0.0) < least:  # nor is a score that is no number
                return Refusal(f"the {self.config.reads} is taken for {label!r}", label)
        return None

    def _classifier(self) -> Any:
        """The model, loaded by the first who asks.

        Raises:
            MmhubError: it is not there, is no classifier, or has no such label.
        """
        name, device = _beside(self.config.model, self._folder), getattr(self._model, "device", "cpu")
        key = (name, str(device))
        if key not in _loaded:
            _loaded[key] = _load(*key)
        found = _loaded[key]
        if self.config.reads not in found.modalities:
            raise UsageError(f"{name} reads no {self.config.reads}", f"it reads {', '.join(found.modalities)}")
        known = getattr(found.decoder.config, "labels", None) or ()
        for label in self.config.labels:
            if label not in known:
                hint = did_you_mean(label, known) or f"it knows {', '.join(known) or 'none'}"
                raise UsageError(f"{name} has no label {label!r}", hint)
        return found


def _beside(name: str, folder: Path | None) -> str:
    """A relative path beside the file that names it wins over one from the current folder."""
    near = folder / name if folder is not None and name.startswith(("./", "../")) else None
    return str(near.resolve()) if near is not None and near.exists() else name


def _load(name: str, device: str) -> Any:
    """The model, in which nobody guards, and which cuts nothing off unsaid."""
    import mmhub

    tried, error = _failed.get((name, device), (0.0, None))
    if error is not None and time.monotonic() - tried < _AGAIN:
        raise error
    try:
        found: Any = mmhub.load(name).to(device).without_guards()
    except MmhubError as error:
        _failed[name, device] = (time.monotonic(), error)
        raise
    processor: Any = getattr(found, "processors", {}).get("text")
    if hasattr(processor, "whole"):
        processor.whole = True
    return found


def _fitting(classifier: Any) -> Callable[[str], bool]:
    """What says whether a classifier reads a text to its end."""
    processor: Any = getattr(classifier, "processors", {}).get("text")

    def fits(text: str) -> bool:
        try:
            processor.read(text, current_policy())
        except InputError:
            if len(text) < 2:
                raise
            return False
        return True

    return fits if hasattr(processor, "read") else lambda text: True


def _pieces(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """A text in pieces that overlap and fit, none of them blank."""
    for start in range(0, max(len(text) - _SHARED, 1), _WINDOW - _SHARED):
        piece = text[start : start + _WINDOW]
        if piece.strip():
            yield from _halves(piece, fits)


def _halves(piece: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """A piece, or its halves until they fit; they share a fifth, where words stand whole that the cut parts."""
    if not piece.strip():
        return
    if fits(piece):
        yield piece
        return
    half, shared = len(piece) // 2, len(piece) // 10
    yield from _halves(piece[: half + shared], fits)
    yield from _halves(piece[half - shared :], fits)
