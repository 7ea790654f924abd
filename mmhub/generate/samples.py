"""Texts for the samples of a model: prompts are read, batches made, guards asked, and answers put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmhub.batch import Batch, Bundle
from mmhub.conversation import Message
from mmhub.errors import InputError, UsageError
from mmhub.generate.media import Media
from mmhub.generate.talks import (
    Layout,
    Lead,
    as_said,
    as_sample,
    kept_tokens,
    read_talk,
    stripped,
    with_stops,
    without_answer,
)
from mmhub.generate.write import Stream, Written, write
from mmhub.interfaces import Generation, LanguageModel, Policy, TextDecoder

if TYPE_CHECKING:
    from mmhub.model import Model

Sample = Mapping[str, Any]
Answer = dict[str, Any]


def generate(
    model: Model,
    samples: Sequence[Sample],
    settings: Generation | None = None,
    *,
    n: int = 1,
    batch_size: int = 32,
    policy: Policy | None = None,
    stream: Stream | None = None,
    truncate: bool = False,
    first: int = 0,
) -> list[Answer]:
    """Write on from each sample's text, or answer whatever else the model turns into text, in order.

    A model that converses answers the last question of "messages", or all that a sample holds as one question.

    An answer is {"text", "finish": "end" | "stop" | "length", "score"}; with `n` > 1 texts a sample it is {"texts",
    "finish", "score"}, all lists. `score` is the log-probability in nats. A prompt longer than the model's context is
    an error, or with `truncate` loses its first tokens, whose number is then in the answer as `truncated`; a text that
    is translated loses its last ones, and a conversation its oldest turns, of which that is the number. What a
    guard refuses is answered `{"refused": reason, "guard": name}`; where guards look at answers, `stream` gets a text
    once they have seen it, else piece by piece: stream(row, sample number, text). Rows are numbered from `first`;
    random choices depend on the seed and these two numbers alone.

    Raises:
        UsageError: the model writes no text. InputError: a sample cannot be read; `row` is its position.
    """
    decoder = text_decoder(model)
    settings = with_stops(model.language_model, settings) if model.converses else settings or decoder.generation
    policy = policy or Policy()
    samples = [dict(sample) if isinstance(sample, Mapping) else sample for sample in samples]
    if model.converses:
        samples = _conversations(model, samples)
        stream = None if stream is None else _leading(stream)
    reviewed = model.reviews_answers

    def answer(part: Sequence[Sample], places: Sequence[int]) -> list[Answer]:  # guards may leave only some of them
        talks = [read_talk(model, sample["messages"]) for sample in part] if model.converses else []

        def bundle_at(rows: Sequence[int]) -> tuple[Bundle, list[int]]:
            taken = [part[row] for row in rows]
            if model.converses:
                return _asked_bundle(model, [talks[row] for row in rows], settings, policy, truncate)
            if isinstance(decoder, LanguageModel):
                return _prompt_bundle(model, decoder, taken, settings, policy, truncate)
            batch, lost = _cut(model, taken, policy) if truncate else (model.collate(taken, policy), [0] * len(rows))
            return model.fused(batch.to(model.device)), lost

        asked = [seen(sample) for sample in part] if model.converses else part
        sizes = [len(text) if isinstance(text := _text(sample), str) else 0 for sample in asked]
        rows = [first + place for place in places]
        return write_rows(model, bundle_at, sizes, settings, n, batch_size, None if reviewed else stream, rows)

    def seen(sample: Sample) -> Sample:
        return as_sample(model, read_talk(model, sample["messages"])) if model.converses else sample

    def said(sample: Sample) -> Sample:
        return as_said(model, read_talk(model, sample["messages"])) if model.converses else sample

    if n == 1 or not model.has_guards:
        answers = model.guarded(samples, answer, seen, policy, said)
    else:
        answers = _each_guarded(model, samples, answer, seen, policy, n, said)
    answers = list(map(stripped, answers)) if model.converses else answers
    if reviewed and stream is not None:
        _stream_reviewed(answers, stream, first)
    return answers


def _conversations(model: Model, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The samples as conversations up to what each of them asks."""
    talks = []
    for row, sample in enumerate(samples):
        model.check_sample(row, sample)
        talk = model.messages_of(sample, row)
        try:
            talks.append({"messages": without_answer(talk)})
        except InputError as error:
            error.row = row
            raise
    return talks


def _asked_bundle(
    model: Model, talks: Sequence[list[Message]], settings: Generation, policy: Policy, truncate: bool
) -> tuple[Bundle, list[int]]:
    """What a language model answers, and how many turns of each conversation were left out."""
    media, layout = Media(model, policy), Layout(model, policy)
    media.read(talks)  # those of all conversations together
    found = []
    for row, talk in enumerate(talks):
        try:
            found.append(layout.fitted(talk, settings, media.size, truncate))
        except InputError as error:
            error.row, error.modality = row, error.modality or "text"
            raise
    kept, scripts, left_out = (list(part) for part in zip(*found, strict=True))
    return media.bundle(kept, scripts), left_out


def _leading(stream: Stream) -> Stream:
    """Pass texts on without the white space at their beginnings."""
    leads: dict[tuple[int, int], Lead] = {}

    def passed(row: int, sample: int, text: str) -> None:
        if (row, sample) not in leads:
            leads[row, sample] = Lead(lambda text: stream(row, sample, text))
        leads[row, sample](text)

    return passed


def _cut(model: Model, samples: Sequence[Sample], policy: Policy) -> tuple[Batch, list[int]]:
    """A batch whose texts are cut to what the encoder takes, and how many tokens of each were cut off."""
    processor: Any = model.processors.get("text")
    lost = [0] * len(samples)
    if not getattr(processor, "whole", False):
        return model.collate(samples, policy), lost
    processor.whole = False
    try:
        batch = model.collate(samples, policy)
    finally:
        processor.whole = True
    items = batch.items["text"]
    for row, length in zip(items.rows.tolist(), items.lengths.tolist(), strict=True):
        lost[row] = max(0, processor.count(_text(samples[row])) - length)
    return batch, lost


def _text(sample: Sample) -> Any:
    return sample.get("text") if isinstance(sample, Mapping) else None


def _stream_reviewed(answers: Sequence[Answer], stream: Stream, first: int) -> None:
    for row, found in enumerate(answers, first):
        for number, text in enumerate(found.get("texts") or [found.get("text")]):
            if text is not None:
                stream(row, number, text)


def text_decoder(model: Model) -> TextDecoder:
    """Return the decoder of a model that writes texts.

    Raises:
        UsageError: it writes none.
    """
    if not isinstance(model.decoder, TextDecoder):
        what = f"{model.name or 'this model'} is for {model.task.name} and writes no text"
        raise UsageError(what, "use `predict`, or name a model that writes")
    return model.decoder


@torch.inference_mode()
def write_rows(
    model: Model,
    bundle_of: Callable[[Sequence[int]], tuple[Bundle, list[int]]],
    sizes: Sequence[int],
    settings: Generation,
    n: int = 1,
    batch_size: int = 32,
    stream: Stream | None = None,
    numbers: Sequence[int] | None = None,
    source: Any = None,
) -> list[Answer]:
    """Write for as many rows as there are `sizes`, rows of like size together; the answers are in order.

    `bundle_of` gives the bundle of some rows, and how many tokens of each prompt were left out; `numbers` are the rows'
    numbers for `stream` and for random choices, if not 0, 1, ...; `source` is as in `write`.
    """
    numbers = range(len(sizes)) if numbers is None else numbers
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            try:
                bundle, left_out = bundle_of(rows)
                known = [numbers[row] for row in rows]
                texts = write(
                    text_decoder(model), bundle, settings, samples=n, rows=known, stream=stream, source=source
                )
            except InputError as error:
                error.row = rows[error.row or 0]
                error.__notes__ = [f"in sample {error.row}"]
                raise
            for row, found, lost in zip(rows, texts, left_out, strict=True):
                answers[row] = _answer(found, n) | ({"truncated": lost} if lost else {})
    finally:
        model.train(was_training)
    return [answers[row] for row in range(len(sizes))]


def _answer(found: list[Written], n: int) -> Answer:
    if n == 1:
        (one,) = found
        return {"text": one.text, "finish": one.finish, "score": one.score}
    return _joined([_answer([one], 1) for one in found])


def _joined(answers: Iterable[Answer]) -> Answer:
    """Several answers to one sample as one; if all are refused, that alone."""
    found = list(answers)
    if all("refused" in answer for answer in found):
        return found[0]
    keys = ("text", "finish", "score")
    texts, finish, score = ([answer.get(key) for answer in found] for key in keys)
    joined: Answer = {"texts": texts, "finish": finish, "score": score}
    lost = max(answer.get("truncated", 0) for answer in found)
    refused = [answer.get("refused") for answer in found]
    return joined | ({"truncated": lost} if lost else {}) | ({"refused": refused} if any(refused) else {})


def _each_guarded(
    model: Model,
    samples: Sequence[Sample],
    answer: Callable[[Sequence[Sample], Sequence[int]], list[Answer]],
    seen: Callable[[Sample], Sample],
    policy: Policy,
    n: int,
    said: Callable[[Sample], Sample],
) -> list[Answer]:
    """Let the guards see each of a sample's texts by itself: what one is refused for does not concern the others."""

    def apart(passed: Sequence[Sample], places: Sequence[int]) -> list[Answer]:
        asked = [place // n for place in places]
        once = dict(zip(asked, passed, strict=True))
        try:
            found = answer(list(once.values()), list(once))
        except InputError as error:
            error.row = asked.index(list(once)[error.row or 0])
            raise
        texts = {row: iter(_split(one, n)) for row, one in zip(once, found, strict=True)}
        return [next(texts[row]) for row in asked]

    for row, sample in enumerate(samples):
        model.check_sample(row, seen(sample) if isinstance(sample, Mapping) else sample)
    try:
        answers = model.guarded([sample for sample in samples for _ in range(n)], apart, seen, policy, said)
    except InputError as error:
        error.row = (error.row or 0) // n
        error.__notes__ = [f"in sample {error.row}"]
        raise
    return [_joined(answers[start : start + n]) for start in range(0, len(answers), n)]


def _split(answer: Answer, n: int) -> list[Answer]:
    """Undo `_joined`."""
    names = {"texts": "text"}
    return [
        {names.get(key, key): part[number] if isinstance(part, list) else part for key, part in answer.items()}
        for number in range(n)
    ]


def _prompt_bundle(
    model: Model,
    decoder: LanguageModel,
    samples: Sequence[Sample],
    settings: Generation,
    policy: Policy,
    truncate: bool,
) -> tuple[Bundle, list[int]]:
    for row, sample in enumerate(samples):
        model.check_sample(row, sample)
    read = [_prompt_ids(decoder, sample, policy, row) for row, sample in enumerate(samples)]
    kept = [fit(decoder, ids, settings, row, truncate) for row, ids in enumerate(read)]
    return bundle_of(model, samples, kept, policy), [len(a) - len(b) for a, b in zip(read, kept, strict=True)]


def bundle_of(model: Model, samples: Sequence[Sample], prompts: Sequence[Tensor], policy: Policy) -> Bundle:
    """Return what a language model begins with: prompts of token ids, and the samples' other modalities."""
    text = text_decoder(model).processor.pack_rows([[ids] for ids in prompts])
    others = [{**sample, "text": None} for sample in samples]
    items = {name: p([o.get(name) for o in others], policy) for name, p in model.processors.items() if name != "text"}
    items = {name: part.to(model.device) for name, part in (items | {"text": text}).items()}
    return model.fusion(model.encode(items, len(samples)))


def _prompt_ids(decoder: LanguageModel, sample: Sample, policy: Policy, row: int) -> Tensor:
    try:
        ids: Tensor = decoder.processor.prompt(sample.get("text") or "", policy)
        if not len(ids):
            raise InputError("the prompt is empty, and the model knows no token that begins a text", "give it a text")
    except InputError as error:
        error.row, error.modality = row, "text"
        raise
    return ids


def fit(decoder: LanguageModel, ids: Tensor, settings: Generation, row: int, truncate: bool) -> Tensor:
    """Return a prompt that leaves room in the context, as it is or, with `truncate`, its last tokens.

    A begin token stays in front: models rely on it more than on the words behind it.
    """
    context, keep = decoder.context, kept_tokens(decoder, settings)
    if context is None or keep is None or len(ids) < context:
        return ids
    if not truncate:
        error = InputError(
            f"the prompt has {len(ids)} tokens, and the model's context of {context} must also hold what is written",
            "shorten it, or let its beginning be left out with truncate=True (--truncate)",
        )
        error.row, error.modality = row, "text"
        raise error
    head = ids[:1] if int(ids[0]) == decoder.processor.begin_id and keep > 1 else ids[:0]
    return torch.cat([head, ids[len(ids) - keep + len(head) :]])
