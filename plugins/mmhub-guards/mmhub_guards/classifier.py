"""The guard `classifier`: another model, loaded by name, says what must not pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmhub.errors import UsageError, did_you_mean
from mmhub.guard import current_policy, media_in, texts_of
from mmhub.spec import Refusal
from mmhub_guards.base import Answer, GuardConfig, Sample, Stage, answer_texts

_WINDOW, _SHARED = 1000, 200  # characters of a text that are judged at once, and that neighbours share
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
    """Refuses what a classifier gives a listed label with at least that probability. Long texts are judged in pieces.

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

    def check_all(self, samples: Sequence[Sample]) -> list[str | Refusal]:
        """Judge several samples in common batches."""
        shown = [list(self._shown(sample)) for sample in samples]
        found = iter(self._judged([one for part in shown for one in part]))
        return [next(filter(None, [next(found) for _ in part]), "") for part in shown]

    def review(self, sample: Sample, answer: Answer) -> Answer | Refusal:
        """Judge the texts of an answer."""
        pieces = [piece for text in answer_texts(answer) for piece in _pieces(text)]
        return next(filter(None, self._judged(pieces)), None) or answer

    def _shown(self, sample: Sample) -> Iterator[Any]:
        if self.config.reads == "image":
            yield from media_in(sample, "image")
            return
        for text in texts_of(sample):
            yield from _pieces(text)

    def _judged(self, raws: list[Any]) -> list[Refusal | None]:
        if not raws:
            return []
        with _lock:
            classifier = self._classifier()
            answers = classifier.predict([{self.config.reads: raw} for raw in raws], policy=current_policy())
        return [self._refusal(answer) for answer in answers]

    def _refusal(self, answer: Mapping[str, Any]) -> Refusal | None:
        scores = answer.get("scores") or {answer["label"]: answer["score"]}
        for label, least in self.config.labels.items():
            if scores.get(label, 0.0) >= least:
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
            import mmhub

            _loaded[key] = mmhub.load(name).to(device).without_guards()
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


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that overlap, none of them blank."""
    for start in range(0, max(len(text) - _SHARED, 1), _WINDOW - _SHARED):
        piece = text[start : start + _WINDOW]
        if piece.strip():
            yield piece
