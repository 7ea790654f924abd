"""Rows as a model is trained on them: which of their text counts in the loss, and where media stand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from mmhub.conversation import media_of
from mmhub.data.cells import cell
from mmhub.data.inputs import usable
from mmhub.data.talks import TalkReader
from mmhub.errors import UsageError
from mmhub.interfaces import Policy, Script, TextDecoder
from mmhub.model import Model


@dataclass(frozen=True)
class Shown:
    """A row. `spans` are {"role"?, "text", "trained", "weight", "media"}, in their order; tokens of media are apart."""

    row: int
    where: str
    tokens: int
    trained: int
    spans: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0

    @property
    def media_tokens(self) -> int:
        return sum(span["media"]["tokens"] for span in self.spans if span["media"])


@dataclass(frozen=True)
class Teller:
    """Tells of rows of a table what a model would learn from them; `limit` is the tokens it reads at once, 0 = all."""

    model: Model
    rows: Any
    inputs: Mapping[str, str]
    target: str
    policy: Policy = field(default_factory=Policy)
    limit: int = 0

    def tell(self, number: int, row: Mapping[str, Any]) -> Shown:
        """Return what of a row is trained.

        Raises:
            InputError: it cannot be read. UsageError: this model is not trained on text.
        """
        decoder: Any = self.model.decoder
        if self.model.converses:
            return self._talk(number, row)
        if not isinstance(decoder, TextDecoder):
            learnt = f": it learns the column {self.target!r}" if self.target else ""
            problem = f"a model for {self.model.task.name} is not trained to write text{learnt}"
            raise UsageError(problem, "leave --loss out, to look at the rows")
        ids = decoder.encode_targets([row.get(self.target)])[0]
        ids = ids[ids >= 0].tolist()
        spans = [*self._inputs(row, number), _span(spelled(decoder.processor, ids, [len(ids)])[0], 1.0)]
        return Shown(number, self.rows.where(number), len(ids) + self._read(row, number), len(ids), spans)

    def text(self, number: int, text: str) -> Shown:
        """Return what of a document is trained: all but its first token, which nothing stands before."""
        processor: Any = self.model.decoder.processor
        ids = processor.read(text, self.policy).tolist()
        begun, rest = spelled(processor, ids, [1, len(ids)])
        spans = [_span(begun, 0.0), _span(rest, 1.0)]
        return Shown(number, self.rows.where(number), len(ids), max(len(ids) - 1, 0), spans)

    def _talk(self, number: int, row: Mapping[str, Any]) -> Shown:
        reader = TalkReader.of(self.model, self.inputs, self.target, self.policy, limit=self.limit, newest=True)
        talk = reader.read(row, self.rows.folder(number))
        sizes = reader.positions(talk.messages)
        media = {
            name: iter(
                [
                    self._medium(name, raw, reader.tokens(name, size))
                    for raw, size in zip(media_of(talk.messages, name), sizes[name], strict=True)
                ]
            )
            for name in reader.media
        }
        roles = [message["role"] for message in talk.messages]
        spans = []
        for what, role in _parts(self.model.processors["text"], talk.script, roles):
            spans.append({"role": role} | (_medium_span(next(media[what])) if isinstance(what, str) else _span(*what)))
        trained = int((talk.script.weights > 0).sum())
        return Shown(number, self.rows.where(number), len(talk.script.ids), trained, spans, talk.left_out)

    def _inputs(self, row: Mapping[str, Any], number: int) -> Iterator[dict[str, Any]]:
        """What a decoder reads by way of encoders."""
        for name, value in self._raws(row, number):
            if name == "text":
                yield _span(" ".join(value) if isinstance(value, (list, tuple)) else str(value), 0.0)
                continue
            processor = self.model.processors[name]
            for raw in processor.items_of(value):
                tokens = self.model.readers[name].token_count(int(processor.length(raw, self.policy)))
                yield _medium_span(self._medium(name, raw, int(tokens)))

    def _read(self, row: Mapping[str, Any], number: int) -> int:
        """How many tokens of text encoders read."""
        texts = [value for name, value in self._raws(row, number) if name == "text"]
        return int(self.model.processors["text"](texts, self.policy).mask.sum()) if texts else 0

    def _raws(self, row: Mapping[str, Any], number: int) -> Iterator[tuple[str, Any]]:
        for name, column in self.inputs.items():
            value = usable(name, cell(row, column), self.rows.folder(number), len(self.inputs) == 1)
            if value is not None:
                yield name, value

    def _medium(self, name: str, raw: Any, tokens: int) -> dict[str, Any]:
        """What is said of an item: its kind, its size as the encoder gets it, its name and its tokens."""
        processor = self.model.processors[name]
        shape = tuple(processor.read(raw, self.policy).shape)
        rate = getattr(getattr(processor, "config", None), "sample_rate", None)
        size = f"{shape[-1]}x{shape[-2]}" if name == "image" else f"{shape[-1] / rate:.1f} s" if rate else ""
        known = isinstance(raw, (str, os.PathLike))
        return {"type": name, "size": size, "name": Path(raw).name if known else "", "tokens": tokens}


def _parts(processor: Any, script: Script, roles: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """Yield (text, weight) or the modality of an item, each with the role of its message."""
    places = {place: name for name, place in script.places}
    ends = list(accumulate(script.turns))
    found: list[tuple[Any, str]] = []  # the weight of a token, or a modality
    weights, turn = iter(script.weights.tolist()), 0
    for place in range(len(script.ids) + len(places)):
        while turn < len(ends) - 1 and place >= ends[turn]:
            turn += 1
        found.append((places[place] if place in places else next(weights), roles[turn]))
    runs = [(key, len(list(tokens))) for key, tokens in groupby(found)]
    texts = [(key, count) for key, count in runs if not isinstance(key[0], str)]
    pieces = iter(spelled(processor, script.ids.tolist(), list(accumulate(count for _, count in texts))))
    for (what, role), count in runs:
        if isinstance(what, str):
            yield from [(what, role)] * count
        else:
            yield (next(pieces), what), role


def spelled(processor: Any, ids: Sequence[int], ends: Sequence[int]) -> list[str]:
    """Return the text of ids in pieces that end there; together they are the whole text wherever that can be."""
    spell = getattr(processor, "spell", processor.decode)
    found, before, start = [], "", 0
    for end in ends:
        text = spell(ids[:end])
        found.append(text[len(before) :] if text.startswith(before) else spell(ids[start:end]))
        before, start = text, end
    return found


def _span(text: str, weight: float) -> dict[str, Any]:
    return {"text": text, "trained": weight > 0, "weight": weight, "media": None}


def _medium_span(medium: dict[str, Any]) -> dict[str, Any]:
    return {"text": "", "trained": False, "weight": 0.0, "media": medium}
