"""The span head: where in its context a question is answered, as in SQuAD (arXiv:1606.05250, arXiv:1806.03822)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Bundle, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import ComponentConfig, Decoder, Stream
from mmhub.interfaces.labels import at_row
from mmhub_heads.answers import Answer, read_answers
from mmhub_heads.summary import check_head, layers

NOWHERE = -100  # the target of a question without an answer, for a head that always answers
_NEVER = -1e9  # the logit of a token that is not of the context; finite, so that no loss becomes NaN


class Span(Decoder):
    """A start and an end among the context's tokens; trained with the mean cross entropy of both.

    Where some training question has no answer, both may also lie on the text's first token, which says so.
    """

    tasks: ClassVar[tuple[str, ...]] = ("question-answering",)
    needs: ClassVar[tuple[str, ...]] = ("text",)
    marks_words: ClassVar[bool] = True  # of a question and its context, the context's tokens are marked
    points: ClassVar[bool] = True

    class Config(ComponentConfig, frozen=True):
        """Settings of the span head.

        `max_answer_tokens` is the longest answer that is given. `unanswerable` is learned from the training targets:
        a question may have no answer. It is then given none if that scores more than `threshold` above the best span,
        in logits.
        """

        max_answer_tokens: int = 30
        unanswerable: bool = False
        threshold: float = 0.0
        dropout: float = 0.1
        hidden: int = 0

        def __post_init__(self) -> None:
            check_head(self.dropout, self.hidden)
            if self.max_answer_tokens < 1:
                raise ValueError(f"max_answer_tokens must be at least 1, got {self.max_answer_tokens}")

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if "text" not in inputs:
            raise UsageError(
                f"the span head reads a text's tokens, and these streams arrive: {', '.join(sorted(inputs)) or 'none'}",
                'use a text encoder and the fusion "streams"',
            )
        self.head = layers(inputs["text"].dim, 2, dropout=config.dropout, hidden=config.hidden)

    @classmethod
    def fit(cls, config: Config, targets: Iterable[Any]) -> Config:
        """Return the config that says whether there are questions without an answer.

        Raises:
            InputError: a target is missing or is no answer (`row` is set).
        """
        missing = [not _answers_at(raw, row) for row, raw in enumerate(targets)]
        return msgspec.structs.replace(config, unanswerable=config.unanswerable or any(missing))

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Turn targets that are token numbers, [first, last], or an empty list for no answer, into (B, 2) long."""
        return torch.tensor([self._tokens(raw, row) for row, raw in enumerate(targets)], dtype=torch.long)

    def encode_pointed(
        self, targets: Sequence[Any], raw: Sequence[Mapping[str, Any]], processors: Mapping[str, Any]
    ) -> Tensor:
        """Find the first answer of each row in its context: the numbers of its first and last token, (B, 2) long.

        Raises:
            InputError: a target is missing or no answer, or does not stand in the context (`row` is set).
        """
        places = []
        for row, (target, sample) in enumerate(zip(targets, raw, strict=True)):
            answers = _answers_at(target, row)
            try:
                places.append(_place(answers[0], sample.get("text"), processors["text"]) if answers else self._nothing)
            except InputError as error:
                raise at_row(error, row) from None
        return torch.tensor(places, dtype=torch.long)

    @property
    def _nothing(self) -> tuple[int, int]:
        return (0, 0) if self.config.unanswerable else (NOWHERE, NOWHERE)

    def _tokens(self, raw: Any, row: int) -> tuple[int, int]:
        answers = _answers_at(raw, row)
        if not answers:
            return self._nothing
        if answers[0].tokens is None:
            raise at_row(InputError("an answer's text can only be looked for in its context"), row)
        return answers[0].tokens

    def weigh(self, targets: Tensor) -> Tensor:
        """Return 1 for each row that is trained on, (B,)."""
        return (targets[:, 0] != NOWHERE).long()

    def references(self, targets: Sequence[Any]) -> list[Any]:
        """Return the texts of all right answers of each row, none where it has no answer."""
        return [[answer.text for answer in _answers_at(raw, row)] for row, raw in enumerate(targets)]

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """Return logits (B, T, 2) of start and end, and in `mask` (B, T) where they may lie. Targets are (B, 2).

        Where the text says nothing of a context, all of it is one.
        """
        text = bundle["text"]
        allowed = text.mask if text.marks is None else text.mask & text.marks
        if self.config.unanswerable:
            first = torch.arange(allowed.shape[1], device=allowed.device) == 0
            allowed = allowed | (first & text.mask)
        logits = self.head(text.tokens).float().masked_fill(~allowed[..., None], _NEVER)
        if targets is None:
            return Output(logits=logits, mask=allowed)
        total = F.cross_entropy(
            logits.transpose(1, 2).reshape(-1, logits.shape[1]), targets.reshape(-1), reduction="sum"
        )
        count = (targets != NOWHERE).sum().clamp(min=1)
        return Output(logits=logits, loss=total / count, mask=allowed)

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Answer `{"tokens", "score"}`: first and last token of the best span, none for no answer; its probability.

        `locate` puts the words of the context in their place.
        """
        assert output.mask is not None
        logits, spans = output.logits.detach().float(), output.mask
        if self.config.unanswerable:
            spans = spans & (torch.arange(spans.shape[1], device=spans.device) > 0)
        first, last, best = best_spans(logits, spans, self.config.max_answer_tokens)
        none = torch.full_like(best, -torch.inf)
        if self.config.unanswerable:
            none = torch.where(output.mask[:, 0], logits[:, 0].sum(1), none)
        chance = logits.logsumexp(1).sum(1)
        refused = (none - best > self.config.threshold) | (best == -torch.inf)
        scores = (torch.where(refused, none, best) - chance).exp()
        rows = zip(first.tolist(), last.tolist(), refused.tolist(), scores.tolist(), strict=True)
        return [{"tokens": [] if empty else [a, b], "score": score} for a, b, empty, score in rows]

    def locate(
        self, answers: Sequence[dict[str, Any]], raw: Sequence[Mapping[str, Any]], processors: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Answer `{"text", "start", "end", "score"}`: characters of the context; "" and None for no answer.

        Raises:
            InputError: a text is no question with its context (`row` is set).
        """
        located = []
        for row, (answer, sample) in enumerate(zip(answers, raw, strict=True)):
            try:
                located.append(_locate(answer, sample.get("text"), processors["text"]))
            except InputError as error:
                raise at_row(error, row) from None
        return located


def best_spans(logits: Tensor, allowed: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return first and last token, (B,), of the span with the greatest sum of start and end logits, and that sum.

    logits (B, T, 2), allowed (B, T) bool; a span has at most `longest` tokens, and of equal ones the first and shortest
    is taken. Where no token is allowed the sum is -infinity.
    """
    start, end = logits.masked_fill(~allowed[..., None], -torch.inf).unbind(2)
    longest = min(longest, logits.shape[1])
    ends = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # (B, T, longest)
    best, place = (start[..., None] + ends).flatten(1).max(1)
    first = place // longest
    return first, first + place % longest, best


def context_of(raw: Any) -> str:
    """Return the context of a question: the second text of a pair.

    Raises:
        InputError: there is none.
    """
    found = raw.get("context", raw.get("text_pair")) if isinstance(raw, Mapping) else None
    if not isinstance(found, str):
        raise InputError("a question needs a context", 'give {"question": ..., "context": ...}')
    return found


def _answers_at(raw: Any, row: int) -> list[Answer]:
    try:
        return read_answers(raw)
    except InputError as error:
        raise at_row(error, row) from None


def _locate(answer: Mapping[str, Any], raw: Any, processor: Any) -> dict[str, Any]:
    text, start, end = "", None, None
    if answer["tokens"]:
        context, places = context_of(raw), processor.offsets(raw)
        start, end = (places[token][side] for side, token in enumerate(answer["tokens"]))
        text = context[start:end]
    return {"text": text, "start": start, "end": end, "score": answer["score"]}


def _place(answer: Answer, raw: Any, processor: Any) -> tuple[int, int]:
    """The first and last token of an answer in its context."""
    if answer.tokens is not None:
        return answer.tokens
    start, end = answer.find(context_of(raw))
    inside = [n for n, place in enumerate(processor.offsets(raw)) if place and place[0] < end and place[1] > start]
    if not inside:
        raise InputError(f"the answer {answer.text!r} holds no token of the context", "leave the row out")
    return inside[0], inside[-1]
