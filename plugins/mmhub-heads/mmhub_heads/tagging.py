"""The tagging head: one label a word, such as parts of speech or the spans of names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Bundle, Features, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import ComponentConfig, Decoder, Stream
from mmhub.interfaces.labels import Labels, at_row, check_labels, is_missing, label_order, label_text
from mmhub.interfaces.spans import find_spans, holds_spans
from mmhub_heads.calibration import Calibrated, check_temperature
from mmhub_heads.summary import check_head, layers

IGNORED = -100  # stands in targets where a row has no further word


class Tagging(Calibrated, Decoder):
    """Softmax over the labels at each word's first token; trained with the mean cross entropy of the words."""

    tasks: ClassVar[tuple[str, ...]] = ("tagging",)
    needs: ClassVar[tuple[str, ...]] = ("text",)
    marks_words: ClassVar[bool] = True
    points: ClassVar[bool] = True

    class Config(ComponentConfig, frozen=True):
        """Settings of the tagging head.

        `labels` is learned from the training targets unless given. With `calibrate`, `temperature` is found on the
        validation rows after training.
        """

        labels: tuple[str, ...] = ()
        label_smoothing: float = 0.0
        dropout: float = 0.1
        hidden: int = 0
        calibrate: bool = False
        temperature: float = 1.0

        def __post_init__(self) -> None:
            check_labels(self.labels)
            check_head(self.dropout, self.hidden)
            check_temperature(self.temperature)
            if not 0 <= self.label_smoothing < 1:
                raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if len(config.labels) < 2:
            raise UsageError(
                f"tagging needs at least 2 labels, got {len(config.labels)}",
                "train on labelled data, or list them in model.decoder.config.labels",
            )
        if "text" not in inputs:
            raise UsageError(
                f"tagging reads the tokens of a text, and these streams arrive: {', '.join(sorted(inputs)) or 'none'}",
                'use a text encoder and the fusion "streams"',
            )
        self.labels = Labels(config.labels)
        self.spans = holds_spans(config.labels)
        self.temperature = config.temperature
        self.head = layers(inputs["text"].dim, len(config.labels), dropout=config.dropout, hidden=config.hidden)

    @classmethod
    def fit(cls, config: Config, targets: Iterable[Any]) -> Config:
        """Return the config with the labels that occur, numbers in order of value; labels given before stay.

        Raises:
            InputError: a target is missing or is no list of labels.
            UsageError: fewer than two labels occur.
        """
        if config.labels:
            return config
        found = sorted({label for tags in _tag_lists(targets) for label in tags}, key=label_order)
        if len(found) < 2:
            raise UsageError(
                f"the training targets hold {len(found)} distinct label(s){f': {found[0]!r}' if found else ''}, and "
                "tagging needs at least 2",
                "check data.target, or list them in labels of the decoder's config",
            )
        return msgspec.structs.replace(config, labels=tuple(found))

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Turn the labels of each row's words into class numbers, (B, W) long, -100 behind a row's last word."""
        rows = []
        for row, tags in enumerate(_tag_lists(targets)):
            try:
                rows.append([self.labels.number(label) for label in tags])
            except InputError as error:
                raise at_row(error, row) from None
        encoded = torch.full((len(rows), max([1, *map(len, rows)])), IGNORED)
        for row, numbers in enumerate(rows):
            encoded[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return encoded

    def encode_pointed(
        self, targets: Sequence[Any], raw: Sequence[Mapping[str, Any]], processors: Mapping[str, Any]
    ) -> Tensor:
        """Turn targets into class numbers as `encode_targets`, and check that each word has its label.

        Raises:
            InputError: a row has more or fewer labels than words (`row` is set), or as `encode_targets`.
        """
        encoded = self.encode_targets(targets)
        for row, (labels, sample) in enumerate(zip((encoded != IGNORED).sum(1).tolist(), raw, strict=True)):
            words = len(split_words(sample.get("text")))
            if labels != words:
                raise _miscounted(words, labels, row)
        return encoded

    def weigh(self, targets: Tensor) -> Tensor:
        """Return the number of labelled words of each row, (B,)."""
        return (targets != IGNORED).sum(1)

    def references(self, targets: Sequence[Any]) -> list[list[str]]:
        """Return the labels of each row's words, as in the `tags` of an answer.

        Raises:
            InputError: a label is missing or unknown (`row` is set), which so comes out before training.
        """
        rows = self.encode_targets(targets).tolist()
        return [[self.labels.names[number] for number in row if number != IGNORED] for row in rows]

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """Return logits (B, T, V), of which those in `mask` (B, T), at the first token of each word, are answers.

        Targets are (B, W). Where the text says nothing of words, every token is one.
        """
        logits = self.head(bundle["text"].tokens).float()
        starts = _word_starts(bundle["text"])
        if targets is None:
            return Output(logits=logits, mask=starts)
        placed = _place(targets, starts)
        total = F.cross_entropy(
            logits.flatten(0, 1),
            placed.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.config.label_smoothing,
            reduction="sum",
        )
        return Output(logits=logits, loss=total / (placed != IGNORED).sum().clamp(min=1), mask=starts)

    def scored(self, output: Output, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the words' logits (N, V) and class numbers (N,), for `calibrate`."""
        assert output.mask is not None
        return output.logits[output.mask], targets[targets != IGNORED]

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Answer `{"tags", "entities"}`: a label for each word and, of labels such as B-PER, the spans they make.

        A span is `{"label", "start", "end"}`, numbers of words, the end exclusive. `details` adds the probability of
        each tag in `scores`, and its mean over a span's words in its `score`.
        """
        assert output.mask is not None
        best = (output.logits.detach().float() / self.temperature).softmax(-1).max(-1)
        rows = zip(output.mask.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
        return [self._answer(*row, details=details) for row in rows]

    def _answer(self, starts: list[bool], numbers: list[int], values: list[float], details: bool) -> dict[str, Any]:
        tags = [self.labels.names[number] for start, number in zip(starts, numbers, strict=True) if start]
        scores = [value for start, value in zip(starts, values, strict=True) if start]
        answer: dict[str, Any] = {"tags": tags}
        if details:
            answer["scores"] = scores
        if self.spans:
            answer["entities"] = [span._asdict() for span in find_spans(tags)]
            for entity in answer["entities"] if details else ():
                part = scores[entity["start"] : entity["end"]]
                entity["score"] = sum(part) / len(part)
        return answer

    def locate(
        self, answers: Sequence[dict[str, Any]], raw: Sequence[Mapping[str, Any]], processors: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Add the `words` of each row, and each span's `text`."""
        located = []
        for answer, sample in zip(answers, raw, strict=True):
            words = split_words(sample.get("text"))
            answer = {**answer, "words": words}
            if "entities" in answer:
                answer["entities"] = [e | {"text": " ".join(words[e["start"] : e["end"]])} for e in answer["entities"]]
            located.append(answer)
        return located


def split_words(raw: Any) -> list[str]:
    """Return the words of a raw text: those of a list, or what stands between blanks; none where there is no text."""
    if raw is None:
        return []
    return raw.split() if isinstance(raw, str) else [str(word) for word in raw]


def _word_starts(features: Features) -> Tensor:
    return features.mask if features.marks is None else features.marks & features.mask


def _place(targets: Tensor, starts: Tensor) -> Tensor:
    """Move the labels of words (B, W) to the tokens where the words begin: (B, T), -100 elsewhere."""
    if not torch.compiler.is_compiling():
        words, labels = starts.sum(1), (targets != IGNORED).sum(1)
        if not torch.equal(words, labels):
            row = int((words != labels).nonzero()[0])
            raise _miscounted(int(words[row]), int(labels[row]), row)
    number = (starts.cumsum(1) - 1).clamp(min=0, max=targets.shape[1] - 1)
    return torch.where(starts, targets.gather(1, number), IGNORED)


def _miscounted(words: int, labels: int, row: int) -> InputError:
    error = InputError(f"the text has {words} word(s) and {labels} label(s)", "give each word one label")
    return at_row(error, row)


def _tag_lists(targets: Iterable[Any]) -> Iterator[list[str]]:
    """Yield the labels of each row in canonical form; an InputError carries its row."""
    for row, raw in enumerate(targets):
        try:
            yield _tag_list(raw)
        except InputError as error:
            raise at_row(error, row) from None


def _tag_list(raw: Any) -> list[str]:
    if isinstance(raw, str) and raw:
        return raw.split()
    if hasattr(raw, "tolist"):  # a numpy array or tensor, as parquet readers give
        raw = raw.tolist()
    if is_missing(raw):
        raise InputError("the target is missing", "give a list with one label for each word, or leave the row out")
    if not isinstance(raw, (list, tuple)):
        raise InputError(f"the labels of a text's words must be a list, got a {type(raw).__name__}")
    return [label_text(label) for label in raw]
