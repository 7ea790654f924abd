"""Transcripts by decoders that write, as Whisper: windows are heard in batches, and what was written is joined.

A decoder for speech says with `dictation` how it is told what to listen for; see `transformers-seq2seq` of mmhub-text.
Any other that writes hears each window by itself, and the texts follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmhub.batch import Items
from mmhub.errors import InputError, UsageError
from mmhub.generate.write import write
from mmhub.interfaces import Generation, Policy
from mmhub.interfaces.roles import Window

if TYPE_CHECKING:
    from mmhub.model import Model

_AUDIO = "audio"
_WINDOW, _TURN = 40, 64  # the bits of a number for random choices from which on a window, and its turn, stand


@dataclass(frozen=True)
class Heard:
    """What was written about one window: token ids and their text, and where the window stands, in seconds."""

    ids: list[int]
    text: str
    start: float
    end: float
    left: float
    right: float


@torch.inference_mode()
def transcribe_written(
    model: Model,
    samples: Sequence[Mapping[str, Any]],
    *,
    window: float,
    overlap: float,
    batch_size: int,
    policy: Policy,
    timestamps: str,
    language: str,
    translate: bool,
    settings: Generation | None,
    numbers: Sequence[int],
) -> list[dict[str, Any]]:
    """Transcribe as `mmhub.speech.transcribe` says; samples hold a recording each, `numbers` are the samples'."""
    voice = _voice(model, timestamps, language, translate)
    if voice and (settings or voice.generation).stop:
        what = "texts that end before a stop text are not for transcripts: windows are heard one by one, and joined"
        raise UsageError(what, "leave `stop` out, and cut the transcript")
    own = float(getattr(model.processors[_AUDIO], "window_seconds", 0.0))
    if own and window > own:
        raise UsageError(f"windows of {window:g} s were asked for, and the model hears {own:g} s", "ask for no more")
    window = window or own or 30.0
    overlap = (window / 3 if voice else 0.0) if overlap < 0 else overlap
    if not 0 <= overlap < window:
        raise UsageError(f"windows of {window:g} s cannot share {overlap:g} s", "take an overlap shorter than a window")
    found: list[list[Heard]] = [[] for _ in samples]
    pieces = _pieces(model, samples, window, overlap, policy)
    was_training = model.training
    model.eval()
    try:
        while batch := list(islice(pieces, batch_size)):
            known = [numbers[row] + (place << _WINDOW) for row, place, _ in batch]
            heard = _hear(model, voice, batch, policy, settings, known)
            for (row, _, piece), (ids, text) in zip(batch, heard, strict=True):
                found[row].append(Heard(ids, text, piece.start, piece.end, piece.left, piece.right))
    finally:
        model.train(was_training)
    return [_joined(voice, windows, timestamps) for windows in found]


def _voice(model: Model, timestamps: str, language: str, translate: bool) -> Any:
    """The decoder as it has been told to listen; None if it cannot be told anything."""
    decoder: Any = model.decoder
    if timestamps == "word":
        what = "a decoder that writes gives times of segments, not of words"
        raise UsageError(what, 'ask for timestamps = "segment", or take a model with a ctc decoder')
    if getattr(decoder.config, "speech", None) is not None or language or translate:
        if not hasattr(decoder, "dictation"):
            raise UsageError("this model knows no languages", "leave language and translate out")
        return decoder.dictation(language=language, translate=translate, times=timestamps != "none")
    return None


def _pieces(
    model: Model, samples: Sequence[Mapping[str, Any]], window: float, overlap: float, policy: Policy
) -> Iterator[tuple[int, int, Window]]:
    """The windows of all recordings one after the other, each with its sample's place and its own in the recording."""
    processor = model.processors[_AUDIO]
    for row, sample in enumerate(samples):
        model.check_sample(row, sample)
        raws = processor.items_of(sample.get(_AUDIO))
        try:
            if len(raws) != 1:
                raise InputError(f"a transcript is of one recording, and {len(raws)} were given", "give one a sample")
            for place, piece in enumerate(processor.windows(raws[0], policy, window, overlap)):
                yield row, place, piece
        except InputError as error:
            raise _at(error, row) from None


def _hear(
    model: Model,
    voice: Any,
    batch: Sequence[tuple[int, int, Window]],
    policy: Policy,
    settings: Generation | None,
    numbers: Sequence[int],
) -> list[tuple[list[int], str]]:
    """Write about windows, each by itself: ids and text. What a window still holds behind its last whole segment is
    heard again, for a text must not end within a word. `numbers` are the windows', for random choices."""
    processor = model.processors[_AUDIO]
    try:
        items: Items = processor([piece.raw for _, _, piece in batch], policy)
    except InputError as error:
        raise _at(error, batch[error.row or 0][0]) from None
    data, texts = items.data, [""] * len(batch)
    ids: list[list[int]] = [[] for _ in batch]
    done, live, turn = torch.zeros(len(batch)), list(range(len(batch))), 0
    while live:
        rows = [numbers[place] + (turn << _TURN) for place in live]
        turn += 1
        for place, (new, text, covered) in zip(list(live), _write(model, voice, items, settings, rows), strict=True):
            ids[place] += new
            texts[place] += text
            done[place] = float("inf") if not covered else float(done[place]) + covered
        own = getattr(processor, "window_seconds", 0.0)
        live = [place for place in live if float(done[place]) < own]
        if live:
            rest: Tensor = processor.rest(data[live], done[live])
            items = replace(items, data=rest, mask=items.mask.new_ones(len(live), items.mask.shape[1]))
            items = replace(items, rows=torch.arange(len(live)), batch=len(live))
    return list(zip(ids, texts, strict=True))


def _write(
    model: Model, voice: Any, items: Items, settings: Generation | None, rows: Sequence[int]
) -> Iterator[tuple[list[int], str, float | None]]:
    """Ids, text, and how many seconds the ids cover, None for all, of each item."""
    bundle = model.fusion(model.encode({_AUDIO: items.to(model.device)}, items.batch))
    decoder: Any = voice or model.decoder
    for (found,) in write(decoder, bundle, settings, rows=rows):
        ids, covered = voice.heard(found.ids) if voice else (list(found.ids), None)
        yield ids, found.text, covered


def _joined(voice: Any, windows: Sequence[Heard], timestamps: str) -> dict[str, Any]:
    if voice:
        # half of what two windows share is better heard in the one, half in the other
        parts = [(w.ids, w.end - w.start, w.left / 2, w.right / 2) for w in windows]
        answer: dict[str, Any] = voice.joined(parts)
        return answer
    answer = {"text": " ".join(text for w in windows if (text := w.text.strip()))}
    if timestamps == "segment":
        if not any(w.end for w in windows):
            what = "this model's processor hears recordings at once and does not say how long they last"
            raise UsageError(what, "leave timestamps out")
        answer["segments"] = [{"text": w.text.strip(), "start": w.start, "end": w.end} for w in windows]
    return answer


def _at(error: InputError, row: int) -> InputError:
    """Set the row and modality, and note them for a traceback."""
    error.row, error.modality = row, _AUDIO
    error.__notes__ = [f"in sample {row}, {_AUDIO}"]
    return error
