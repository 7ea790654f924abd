"""Recordings of any length, and sound that is still coming in, to text by decoders that hear token by token (CTC).

A recording is heard in windows that overlap. Of what two windows both heard, each gives the half that lies further from
its edge; what is joined so is as if heard at once, and is written down in pieces that end where a word ends. Words
begin and end where the silence beside them does (`mmhub.speech.silence`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mmhub.batch import Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Policy, Window
from mmhub.speech.silence import STEP, loudness, settle

if TYPE_CHECKING:
    from mmhub.model import Model

WINDOW, OVERLAP = 30.0, 4.0  # seconds that are heard at once, and of those what the next window hears, too
PIECE = 20.0  # seconds of sound that are written down at once, if somewhere in them a word ends
SILENCE = 0.5  # seconds between two words that part two segments


class Hearer(Protocol):
    """What is asked of a decoder that hears token by token, each `seconds` of sound."""

    seconds: float | None

    def emissions(self, output: Output) -> list[Tensor]:
        """Return what was heard in each row, (T, V), on the CPU."""

    def answer(
        self, log_probs: Tensor, details: bool = True, search: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write down what was heard (T, V): `{"text", "words", "score"}`."""

    def align(self, log_probs: Tensor, text: str) -> list[dict[str, Any]]:
        """Return when the words of a text were said: `{"word", "start", "end"}`."""

    def gaps(self, log_probs: Tensor) -> list[tuple[int, int]]:
        """Return where words can be parted: behind the last token of one, and where the next begins."""


def transcribe_ctc(
    model: Model,
    samples: Sequence[Mapping[str, Any]],
    *,
    window: float = 0.0,
    overlap: float = -1.0,
    batch_size: int = 32,
    policy: Policy | None = None,
    search: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Write down each recording: `{"text", "words", "segments", "score"}`, times in seconds.

    `window` and `overlap` are in seconds, 0 and -1 for 30 and 4. At most `batch_size` windows are in memory. An encoder
    that does not say what a token lasts hears each recording at once, and no times are given. `search` changes keys of
    the decoder's search.

    Raises:
        UsageError: the decoder does not hear token by token, or no windows can be cut so.
        InputError: a recording cannot be read; `row` is its position.
    """
    hearer = hearer_of(model)
    size, share = window or WINDOW, overlap if overlap >= 0 else min(OVERLAP, (window or WINDOW) / 4)
    found = [_Transcript(hearer, search) for _ in samples]
    policy = policy or Policy()
    windows = _windows(model, samples, size, share, policy)
    answers: list[dict[str, Any]] = []
    while part := list(islice(windows, batch_size)):
        heard = hear(model, [one.raw for _, one in part], policy)
        for (row, one), log_probs in zip(part, heard, strict=True):
            answers += [found[done].finish() for done in range(len(answers), row)]
            found[row].add(one, log_probs)
    return answers + [one.finish() for one in found[len(answers) :]]


def align(model: Model, audio: Any, text: str, *, policy: Policy | None = None) -> list[dict[str, Any]]:
    """Return when each word of a text that is known was said in a recording: `{"word", "start", "end"}`, seconds.

    The recording is heard at once, so it should last minutes at most.

    Raises:
        UsageError: the decoder does not hear token by token. InputError: the recording cannot be read, or is too short
            for the text, or the text has units that the decoder does not know.
    """
    hearer = hearer_of(model)
    model.check_sample(0, {"audio": audio})
    log_probs = hear(model, [audio], policy)[0]
    try:
        words = hearer.align(log_probs, text)
    except InputError as error:  # its hint is for data to train on
        raise InputError(error.message, "give what was said, in units that the model knows") from None
    policy = policy or Policy()
    (whole,) = model.processors["audio"].windows(audio, policy, policy.max_seconds, 0.0)
    return settle(words, _loudness(whole))


class Stream:
    """Sound that is still coming in: `feed` samples as they come, and `finish` for the answer.

    `rate` is that of the samples, in Hz. Of what `feed` returns only the last `window` seconds may still change, and
    the search keeps out of it: that is the best path alone. `finish` answers as `transcribe_ctc` does with the same
    window and overlap: exactly so where `rate` is the model's own; else windows are resampled one by one, which changes
    samples at their very edges, that is in the overlap.
    """

    def __init__(
        self,
        model: Model,
        rate: int,
        *,
        window: float = 8.0,
        overlap: float = 2.0,
        search: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.rate, self._search = model, rate, search
        usable = rate > 0 and math.isfinite(window) and math.isfinite(overlap)
        self._size, self._share = (round(window * rate), round(overlap * rate)) if usable else (0, 0)
        if not usable or not 0 <= self._share < self._size:
            raise UsageError(
                f"cannot hear {window:g} s at once that share {overlap:g} s, at {rate} Hz",
                "expected a rate in Hz, and an overlap from 0 to less than a window",
            )
        hearer = hearer_of(model)
        if hearer.seconds is None:
            raise UsageError("this encoder does not say how long a token lasts", "predict whole recordings instead")
        self._hearer: Hearer = hearer
        self._text = _Transcript(hearer, search)
        self._held = torch.zeros(0)
        self._start = self._left = 0  # where what is held begins, and what of it the window before heard, in samples

    def feed(self, samples: Any) -> str:
        """Hear more samples, a mono array or tensor (S,) of any length, and return the text so far.

        Raises:
            InputError: they are no finite samples.
        """
        self._held = torch.cat((self._held, _samples(samples)))
        step = self._size - self._share
        while len(self._held) > self._size and len(self._held) - step >= self._least:
            self._text.add(*self._hear(self._held[: self._size], self._share))
            self._held, self._start, self._left = self._held[step:], self._start + step, self._share
        if len(self._held) < max(self._least, 1):
            return self._text.so_far()
        return self._text.so_far(*self._hear(self._held[: self._size], 0))

    def finish(self) -> dict[str, Any]:
        """Return `{"text", "words", "segments", "score"}` of all that was heard, and begin anew."""
        if len(self._held) >= max(self._least, 1):
            if len(self._held) > self._size:
                last = len(self._held) - self._least
                self._text.add(*self._hear(self._held[: self._size], self._size - last))
                self._held, self._start, self._left = self._held[last:], self._start + last, self._size - last
            self._text.add(*self._hear(self._held, 0))
        answer = self._text.finish()
        self._text, self._held = _Transcript(self._hearer, self._search), torch.zeros(0)
        self._start = self._left = 0
        return answer

    @property
    def _least(self) -> int:
        """How many samples the encoder needs at least."""
        settings = getattr(self.model.processors["audio"], "config", None)
        least, rate = getattr(settings, "min_samples", 1), getattr(settings, "sample_rate", self.rate)
        return math.ceil(least * self.rate / rate)

    def _hear(self, samples: Tensor, right: int) -> tuple[Window, Tensor]:
        raw = {"array": samples.numpy(), "sampling_rate": self.rate, "mono": True}
        start, end = self._start / self.rate, (self._start + len(samples)) / self.rate
        window = Window(raw, start, end, self._left / self.rate, right / self.rate)
        return window, hear(self.model, [raw])[0]


def hearer_of(model: Model) -> Any:
    """Return the model's decoder.

    Raises:
        UsageError: it does not hear token by token.
    """
    if not hasattr(model.decoder, "emissions"):
        raise UsageError(f"{model.name or 'this model'} has no CTC decoder", "name a model trained with `ctc`")
    return model.decoder


@torch.inference_mode()
def hear(model: Model, audio: Sequence[Any], policy: Policy | None = None) -> list[Tensor]:
    """Return what was heard in each of these recordings, (T, V) log-probabilities."""
    was_training = model.training
    model.eval()
    try:
        batch = model.collate([{"audio": one} for one in audio], policy).to(model.device)
        heard: list[Tensor] = hearer_of(model).emissions(model(batch))
        return heard
    finally:
        model.train(was_training)


def _windows(
    model: Model, samples: Sequence[Mapping[str, Any]], size: float, share: float, policy: Policy
) -> Iterator[tuple[int, Window]]:
    """The windows of all recordings, each with the position of its sample."""
    for row, sample in enumerate(samples):
        model.check_sample(row, sample)
        try:
            if hearer_of(model).seconds is None:
                yield row, Window(sample["audio"], 0.0, 0.0)
            else:
                for window in model.processors["audio"].windows(sample["audio"], policy, size, share):
                    yield row, window
        except InputError as error:
            error.row, error.modality = row, "audio"
            raise


class _Transcript:
    """What was heard of one recording so far: pieces that are written down, and tokens that are not yet."""

    def __init__(self, hearer: Hearer, search: Mapping[str, Any] | None) -> None:
        self.hearer, self.search = hearer, search
        self.pieces: list[dict[str, Any]] = []
        self.loud = torch.zeros(0)  # of the recording, see `loudness`
        self.held: Tensor | None = None
        self.first = 0  # the number of the first token that is held

    def add(self, window: Window, log_probs: Tensor) -> None:
        """Go on with what was heard in the next window, (T, V)."""
        self.held = self._joined(window, log_probs)
        if self.hearer.seconds is not None and window.end:
            self.loud = torch.cat((self.loud, _loudness(window)[len(self.loud) - round(window.start / STEP) :]))
        seconds = self.hearer.seconds
        while seconds is not None and len(self.held) * seconds > PIECE:
            end = self._cut(self.held, math.ceil(PIECE / seconds))
            self._write(self.held[:end])
            self.held = self.held[end:]
            self.first += end

    def so_far(self, window: Window | None = None, log_probs: Tensor | None = None) -> str:
        """The text with what is heard at the moment, by the best path."""
        held = self._joined(window, log_probs) if window is not None and log_probs is not None else self.held
        last = self.hearer.answer(held, details=False, search=_PATH)["text"] if held is not None else ""
        return _text([*self.pieces, {"text": last}])

    def finish(self) -> dict[str, Any]:
        if self.held is not None and len(self.held):
            self._write(self.held)
        answer: dict[str, Any] = {"text": _text(self.pieces)}
        if self.hearer.seconds is not None:
            words = settle([word for piece in self.pieces for word in piece["words"]], self.loud)
            answer |= {"words": words, "segments": segments(words)}
        labels = sum(len(piece["text"]) for piece in self.pieces)
        logs = [math.log(max(piece["score"], 1e-30)) * len(piece["text"]) for piece in self.pieces]
        return answer | {"score": math.exp(math.fsum(logs) / labels) if labels else 1.0}

    def _joined(self, window: Window, log_probs: Tensor) -> Tensor:
        """The tokens that are held with those of a window that are new, up to the middle of what the next hears."""
        seconds, held = self.hearer.seconds, log_probs[:0] if self.held is None else self.held
        if seconds is None:
            return log_probs
        own = _token(window.start, seconds)
        end = _token(window.end - window.right / 2, seconds) - own if window.right else len(log_probs)
        return torch.cat((held, log_probs[max(self.first + len(held) - own, 0) : end]))

    def _cut(self, held: Tensor, most: int) -> int:
        """Where to part tokens: in the middle of the longest pause between words in the later half, if any."""
        gaps = [(first, end) for first, end in self.hearer.gaps(held[:most]) if end > most // 2]
        if not gaps:
            return most
        first, end = max(gaps, key=lambda gap: gap[1] - gap[0])
        return (first + end + 1) // 2

    def _write(self, log_probs: Tensor) -> None:
        piece = self.hearer.answer(log_probs, search=self.search)
        shift = self.first * (self.hearer.seconds or 0.0)
        for word in piece.get("words", ()):
            word["start"], word["end"] = round(word["start"] + shift, 3), round(word["end"] + shift, 3)
        self.pieces.append(piece)


_PATH = {"beams": 1, "language_model": ""}


def segments(words: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join words between pauses to `{"text", "start", "end"}`.

    >>> segments([{"word": "one", "start": 0.0, "end": 0.4}, {"word": "two", "start": 1.0, "end": 1.3}])
    [{'text': 'one', 'start': 0.0, 'end': 0.4}, {'text': 'two', 'start': 1.0, 'end': 1.3}]
    """
    found: list[dict[str, Any]] = []
    for word in words:
        if found and word["start"] - found[-1]["end"] < SILENCE:
            found[-1] |= {"text": f"{found[-1]['text']} {word['word']}", "end": word["end"]}
        else:
            found.append({"text": word["word"], "start": word["start"], "end": word["end"]})
    return found


def _loudness(window: Window) -> Tensor:
    """The loudness of a window, (F,), none of a recording that its processor does not cut."""
    if not window.end:
        return torch.zeros(0)
    return loudness(torch.as_tensor(window.raw["array"]), window.raw["sampling_rate"])


def _token(time: float, seconds: float) -> int:
    """The number of the first token that is about a time or what follows it."""
    return math.ceil(round(time / seconds, 3))


def _text(pieces: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(piece["text"] for piece in pieces if piece["text"])


def _samples(given: Any) -> Tensor:
    samples = torch.as_tensor(given)
    if samples.ndim != 1 or not samples.is_floating_point() or not bool(torch.isfinite(samples).all()):
        raise InputError(
            f"got {samples.dtype} samples of shape {tuple(samples.shape)}", "feed finite mono samples, (S,), as floats"
        )
    return samples.to(torch.float32).cpu()
