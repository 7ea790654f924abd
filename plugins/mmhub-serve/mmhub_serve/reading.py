"""Samples of a request, checked and read one by one, so that a bad one never reaches the others' batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmhub.conversation import read_script, text_of
from mmhub.errors import InputError
from mmhub.generate.talks import read_talk
from mmhub.interfaces import LanguageModel
from mmhub.model import Model
from mmhub_serve.errors import Refused
from mmhub_serve.settings import Limits

Sample = Mapping[str, Any]
_CHARACTERS = 32  # a text with more of them for each token that is allowed is refused uncounted
_BYTES = 4  # of a character, at most; no tokenizer makes more tokens of a text than it has bytes


class Reader:
    """Reads samples for one model within the limits of a server. Its methods may be called from several threads.

    Raises:
        UsageError, InputError: the sample is not for this model, cannot be read, or is beyond a limit; `row` is what
        was given.
    """

    def __init__(self, model: Model, limits: Limits) -> None:
        self._model, self._limits, self._policy = model, limits, limits.policy
        for processor in model.processors.values():
            getattr(processor, "tokenizer", None)  # parsed now, once, not by the first requests side by side

    def tensors(self, sample: Sample, row: int) -> tuple[tuple[Sample, dict[str, list[Any]]], int]:
        """Return a sample with its tensors by modality, and how many positions its encoders will see."""
        self.check(sample, row)
        read, positions = {}, 0
        for name, processor in self._model.processors.items():
            try:
                read[name] = processor.read_row(sample.get(name), self._policy)
            except InputError as error:
                error.row = row
                raise
            lengths = [1 if processor.fixed_length else len(tensor) for tensor in read[name]]
            positions += sum(map(self._model.readers[name].token_count, lengths))
        kept = sample if self._model.decoder.points else {}
        return (kept, read), max(positions, 1)

    def held(self, payload: tuple[Sample, dict[str, list[Any]]]) -> int:
        """Bytes that what `tensors` returned takes."""
        return sum(tensor.numel() * tensor.element_size() for items in payload[1].values() for tensor in items)

    def chats(self, samples: Sequence[Sample]) -> bool:
        """Are these conversations with a language model of texts alone?

        Raises:
            Refused: 400, some are and others are not.
        """
        if self._model.converses or not isinstance(self._model.decoder, LanguageModel):
            return False
        talks = ["messages" in sample for sample in samples if isinstance(sample, Mapping)]
        if any(talks) and not all(talks):
            raise Refused(400, "some samples hold messages and others texts", "ask for them apart", param="samples")
        return any(talks)

    def count(self, samples: Sequence[Sample]) -> None:
        """Check that all samples together hold no more pictures or sounds than a request may have samples."""
        most, total = self._limits.samples, 0
        for row, sample in enumerate(samples):
            total += _items(sample) if isinstance(sample, Mapping) else 1
            if total > max(most, len(samples)):
                what = f"there are more than {most} pictures or sounds in one request"
                error = InputError(what, "ask for fewer at a time")
                error.row = row
                raise error

    def check(self, sample: Sample, row: int) -> int:
        """Check a sample that the model reads itself; return about how long its texts are, in characters."""
        if self.chats([sample]):
            return self._check_messages(sample, row)
        self._model.check_sample(row, sample)
        try:
            if self._model.converses:
                return self._check_talk(sample, row)
            return sum(self._check_text(raw) for raw in self._texts(sample))
        except InputError as error:
            error.row, error.modality = row, error.modality or "text"
            raise

    def _check_messages(self, sample: Sample, row: int) -> int:
        """Check a conversation with a language model of texts alone; return about how long it is, in characters."""
        if beside := {name: raw for name, raw in sample.items() if name != "messages"}:
            self._model.check_sample(row, beside)
        try:
            if beside:
                raise InputError(f"the sample holds messages and {', '.join(map(repr, beside))}", "give one of them")
            size = sum(len(text_of(message)) for message in read_talk(self._model, sample["messages"]))
            self._check_size(size)
        except InputError as error:
            error.row, error.modality = row, error.modality or "text"
            raise
        return size

    def recording(self, sample: Sample, row: int) -> int:
        """Check a sample with a recording by its header; return how many tokens the recording becomes."""
        self.check(sample, row)
        processor, encoder = self._model.processors["audio"], self._model.readers["audio"]
        try:
            lengths = [processor.length(raw, self._policy) for raw in processor.items_of(sample.get("audio"))]
            return max(1, sum(map(encoder.token_count, lengths)))
        except InputError as error:
            error.row, error.modality = row, "audio"
            raise

    def _texts(self, sample: Sample) -> list[Any]:
        processor = self._model.processors.get("text")
        return processor.items_of(sample.get("text")) if processor is not None else []

    def _check_text(self, raw: Any) -> int:
        size = sum(map(len, _strings(raw)))
        if size * _BYTES > self._limits.tokens:
            self._check_size(size)
            self._check_count(self._count(raw))
        return size

    def _check_talk(self, sample: Sample, row: int) -> int:
        talk = self._model.messages_of(sample, row)
        size = sum(len(text_of(message)) for message in talk)
        if size * _BYTES > self._limits.tokens:
            self._check_size(size)
            processor: Any = self._model.processors["text"]
            self._check_count(len(read_script(processor, talk, self._policy, row).ids))
        return size

    def _check_size(self, characters: int) -> None:
        most = self._limits.tokens * _CHARACTERS
        if characters > most:
            raise InputError(f"the text has {characters} characters, more than the limit of {most}", "shorten it")

    def _check_count(self, tokens: int) -> None:
        if tokens > self._limits.tokens:
            raise InputError(
                f"the text has {tokens} tokens, more than the limit of {self._limits.tokens}", "shorten it"
            )

    def _count(self, raw: Any) -> int:
        """Tokens of a text before anything is cut off."""
        processor: Any = self._model.processors["text"]
        if isinstance(self._model.decoder, LanguageModel):
            return len(processor.prompt(raw, self._policy))
        if hasattr(processor, "count") and not getattr(processor, "words", False):
            return int(processor.count(raw, self._policy))
        return len(processor.read(raw, self._policy))


def _items(sample: Sample) -> int:
    """How many pictures or sounds a sample holds, of the kind that it has most of; at least 1."""
    lists = [raw for name, raw in sample.items() if name not in ("text", "messages") and isinstance(raw, (list, tuple))]
    talk = sample.get("messages")
    for message in talk if isinstance(talk, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        lists.append([part for part in content if not _is_text(part)] if isinstance(content, (list, tuple)) else [])
    return max(1, *map(len, lists), sum(map(len, lists)) if talk is not None else 0)


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text"


def _strings(raw: Any) -> Iterator[str]:
    """The texts of a raw input: itself, a pair's two, or a list of words."""
    if isinstance(raw, str):
        yield raw
    elif isinstance(raw, Mapping):
        for value in raw.values():
            yield from _strings(value)
    elif isinstance(raw, (list, tuple)):
        for value in raw:
            yield from _strings(value)
