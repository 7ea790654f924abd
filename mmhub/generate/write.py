"""The loop that writes: choose a token for each row, let rows that have ended leave, and go on with the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmhub.batch import Bundle
from mmhub.errors import InputError, UsageError
from mmhub.generate.beams import search
from mmhub.generate.choice import Draw, Rules
from mmhub.generate.growing import GrowingText
from mmhub.generate.recompute import Recomputed
from mmhub.generate.watermark import Mark
from mmhub.interfaces import Generation, LanguageModel, TextDecoder, own_stream

Stream = Callable[[int, int, str], None]  # row number, sample number, the text that came


@dataclass(frozen=True)
class Written:
    """One text that was written.

    `ids` are its tokens with the end token if it came; `score` is the sum of the tokens' log-probabilities in nats, as
    the model gives them, before any temperature, filter or penalty.
    """

    ids: tuple[int, ...]
    text: str
    score: float
    finish: Literal["end", "stop", "length"]  # an end token came, a stop text did, or it may not become longer


@torch.inference_mode()
def write(
    decoder: TextDecoder,
    bundle: Bundle,
    settings: Generation | None = None,
    *,
    samples: int = 1,
    rows: Sequence[int] | None = None,
    stream: Stream | None = None,
    cache: bool = True,
    source: Any = None,
) -> list[list[Written]]:
    """Write `samples` texts for each row of a bundle that the decoder's `begin` takes; with beams, the best ones.

    `rows` are the rows' numbers, 0, 1, ... by default: random choices depend on `settings.seed` and on the numbers of
    row and sample alone. `stream` is called with new text as soon as nothing can change it any more. Without `cache`
    all is computed anew for each token, with the same result. `source` has `begin`, `step` and `select` in the place of
    the decoder's own.

    Raises:
        InputError: a prompt leaves no room in the decoder's context; `row` is set. UsageError: more samples than beams,
            or no key for a watermark.
    """
    settings = settings or decoder.generation
    numbers = list(rows) if rows is not None else list(range(_size(bundle)))
    prompts = _prompts(decoder, bundle)
    rooms = [min(settings.max_new_tokens, room) for room in _rooms(decoder, bundle)]
    if settings.beams > 1 and samples > settings.beams:
        raise UsageError(f"{samples} texts were asked for, of {settings.beams} beams", "ask for no more than the beams")
    source = source or (decoder if cache else Recomputed(decoder))
    limit = decoder.limit
    logits, state = source.begin(bundle)
    ends = sorted(set(decoder.processor.stop_ids))
    if settings.beams > 1:
        found = search(source, logits, state, settings, prompts, rooms, ends, decoder.processor.decode, limit)
        texts = [[_finished(decoder, settings, ends, *one) for one in row[:samples]] for row in found]
        if stream is not None:
            _stream_whole(stream, numbers, texts)
        return texts
    writers = [
        _Writer(number, sample, room, decoder, settings, stream)
        for number, room in zip(numbers, rooms, strict=True)
        for sample in range(samples)
    ]
    if samples > 1:
        each = torch.arange(len(numbers), device=logits.device).repeat_interleave(samples)
        logits, state = logits[each], source.select(state, each)
    rules = Rules(settings, [ids for ids in prompts for _ in range(samples)], ends, limit)
    draw = None
    if settings.temperature:
        mark = Mark(settings.watermark, len(writers), logits.device) if settings.watermark else None
        draw = Draw(settings, [(w.row, w.sample) for w in writers], logits.device, mark)
    _loop(source, logits, state, writers, rules, draw, frozenset(ends))
    done = [writer.written() for writer in writers]
    return [done[start : start + samples] for start in range(0, len(done), samples)]


def _loop(
    source: Any,
    logits: Tensor,
    state: Any,
    writers: list[_Writer],
    rules: Rules,
    draw: Draw | None,
    ends: frozenset[int],
) -> None:
    live = writers
    totals = torch.zeros(len(live), device=logits.device)
    step = 0
    while True:
        scores = rules(logits, step)
        ids = scores.argmax(1) if draw is None else draw(scores)
        totals = totals + (logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(1))
        goes_on = [writer.take(token, ends) for writer, token in zip(live, ids.tolist(), strict=True)]
        rules.take(ids)
        step += 1
        if not all(goes_on):
            for writer, goes, total in zip(live, goes_on, totals.tolist(), strict=True):
                if not goes:
                    writer.score = total
            keep = [place for place, goes in enumerate(goes_on) if goes]
            if not keep:
                return
            index = torch.tensor(keep, device=ids.device)
            live = [live[place] for place in keep]
            ids, totals, state = ids[index], totals[index], source.select(state, index)
            rules.select(index)
            if draw is not None:
                draw.select(keep)
        logits, state = source.step(ids, state)


class _Writer:
    """One text that is being written."""

    def __init__(
        self, row: int, sample: int, room: int, decoder: TextDecoder, settings: Generation, stream: Stream | None
    ) -> None:
        self.row, self.sample = row, sample
        self.ids: list[int] = []
        self.score = 0.0
        self._room, self._stream = room, stream
        self._decode = decoder.processor.decode
        self._finish: Literal["end", "stop", "length"] = "length"
        self._growing = GrowingText(self._decode, settings.stop) if stream or settings.stop else None

    def take(self, token: int, ends: frozenset[int]) -> bool:
        """Add a token; return whether the text goes on."""
        self.ids.append(token)
        growing = self._growing
        if token in ends:
            self._finish = "end"
        elif growing is not None and growing.add(token):
            self._finish = "stop"
        elif len(self.ids) < self._room:
            if self._stream is not None and growing is not None and (news := growing.news()):
                self._stream(self.row, self.sample, news)
            return True
        if self._stream is not None and growing is not None and (news := growing.news(final=True)):
            self._stream(self.row, self.sample, news)
        return False

    def written(self) -> Written:
        if self._finish == "stop":
            assert self._growing is not None
            text = self._growing.text
        else:
            text = self._decode(self.ids[:-1] if self._finish == "end" else self.ids)
        return Written(tuple(self.ids), text, self.score, self._finish)


def _finished(decoder: TextDecoder, settings: Generation, ends: Sequence[int], ids: list[int], score: float) -> Written:
    """A hypothesis of the beam search as a text."""
    if ids[-1] in ends:
        return Written(tuple(ids), decoder.processor.decode(ids[:-1]), score, "end")
    text = decoder.processor.decode(ids)
    places = [at for stop in settings.stop if (at := text.find(stop)) >= 0]
    return Written(tuple(ids), text[: min(places)] if places else text, score, "stop" if places else "length")


def _stream_whole(stream: Stream, numbers: Sequence[int], texts: list[list[Written]]) -> None:
    for number, row in zip(numbers, texts, strict=True):
        for sample, found in enumerate(row):
            stream(number, sample, found.text)


def _size(bundle: Bundle) -> int:
    return int(next(iter(bundle.values())).mask.shape[0])


def _prompts(decoder: TextDecoder, bundle: Bundle) -> list[list[int]]:
    """The ids each row has read of the text that is written on; for decoders that begin a new one, the start token."""
    if not isinstance(decoder, LanguageModel):
        return [[] if decoder.start is None else [decoder.start] for _ in range(_size(bundle))]
    stream = own_stream(bundle)
    assert stream.ids is not None
    return [[i for i in row if i >= 0] for row in stream.ids.tolist()]


def _rooms(decoder: TextDecoder, bundle: Bundle) -> list[int]:
    """How many tokens each row may have behind its prompt."""
    rows = _size(bundle)
    if decoder.context is None:
        return [2**62] * rows
    if not isinstance(decoder, LanguageModel):
        return [decoder.context] * rows
    rooms = [decoder.context - length for length in own_stream(bundle).lengths.tolist()]
    for row, room in enumerate(rooms):
        if room < 1:
            error = InputError(
                f"the prompt has {decoder.context - room} tokens, and the model's context is {decoder.context}",
                "shorten it to leave room for what is written",
            )
            error.row = row
            raise error
    return rooms
