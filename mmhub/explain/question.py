"""What is explained: the number that a model's answer to one sample stands on, and how it is read off a forward pass.

A question has K numbers: one of a label, value or pair, and one for each token of a text that was written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Batch, Bundle, Items
from mmhub.errors import InputError, UsageError, did_you_mean
from mmhub.explain.places import grown
from mmhub.guard import texts_of
from mmhub.interfaces import Generation, LanguageModel, Policy, TextDecoder, own_stream
from mmhub.model import Model

LONGEST = 32  # tokens of an answer that are written and explained
_IGNORED = -100  # what encode_targets has where nothing is chosen


@dataclass(frozen=True)
class Question:
    """One sample, collated, and what is asked about it.

    Attributes:
        batch: of one row, on the model's device; a language model's text goes on with what it wrote.
        answer: what `predict` says. target, unit: as in an `Explanation`.
        measure: what the decoder reads, R rows -> the numbers (R, K).
        ids: of the tokens that were written, () where none were. written: their texts.
        labels: the same as `encode_targets` gives them, (1, L), for decoders that read them beside the bundle.
        sample: as guards have let it through, which is what the model has read.
    """

    batch: Batch
    answer: Mapping[str, Any]
    target: str
    unit: str
    measure: Callable[[Bundle], Tensor]
    ids: tuple[int, ...] = ()
    written: tuple[str, ...] = ()
    labels: Tensor | None = None
    notes: tuple[str, ...] = ()
    sample: Mapping[str, Any] = field(default_factory=dict)


def ask(
    model: Model,
    sample: Mapping[str, Any],
    target: str | None,
    policy: Policy,
    settings: Generation | None = None,
) -> Question:
    """Find out what to explain: the `target`, or what the model answers; a language model writes it by `settings`.

    Raises:
        UsageError: the model has no such target, or its answers cannot be explained. InputError: the sample cannot be
        read, or a guard refuses it, or changes the text that the model answers.
    """
    model.check_sample(0, sample)
    if isinstance(model.decoder, LanguageModel):
        return _ask_writer(model, sample, target, policy, settings)
    free = copy.copy(model).without_guards()
    passed, answer = _guarded(model, sample, policy, target, lambda one: _answered(free, one, policy, settings))
    found = _asked(model, passed, answer, target, policy)
    return replace(found, sample=passed, notes=(*found.notes, *_changed_note(sample, passed)))


def _asked(
    model: Model, sample: Mapping[str, Any], answer: Mapping[str, Any], target: str | None, policy: Policy
) -> Question:
    batch = model.collate([sample], policy).to(model.device)
    if isinstance(model.decoder, TextDecoder):
        return _ask_reader(model, batch, answer, target)
    if hasattr(model.decoder, "emissions"):
        return _ask_hearer(model, batch, answer, target)
    kind = "retrieval" if model.decoder.paired else model.task.name
    if kind not in _KINDS:
        raise UsageError(f"answers of the task {kind} cannot be explained", f"it can be {', '.join(_KINDS)}")
    return _KINDS[kind](model, batch, answer, target)


def _answered(model: Model, sample: Mapping[str, Any], policy: Policy, settings: Generation | None) -> dict[str, Any]:
    if settings is None:
        return model.predict([sample], policy=policy)[0]
    if model.task.name == "speech-recognition":
        from mmhub.speech import transcribe

        return transcribe(model, [sample], policy=policy, settings=settings)[0]
    return model.generate([sample], settings, policy=policy)[0]


def _guarded(
    model: Model,
    sample: Mapping[str, Any],
    policy: Policy,
    target: str | None,
    answer_of: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The sample as guards let it through, and the answer to it.

    Raises:
        InputError: a guard refuses either, or changes the text that would be explained.
    """
    taken: list[tuple[Mapping[str, Any], dict[str, Any]]] = []

    def answers(passed: Sequence[Mapping[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
        taken.extend((one, answer_of(one)) for one in passed)  # of one sample, which may have been refused
        return [dict(given) for _, given in taken]

    seen, said = partial(_seen, model, True), partial(_seen, model, False)
    (answer,) = model.guarded([sample], answers, seen, policy, said)
    if "refused" in answer:
        raise InputError(f"the guard {answer.get('guard')} refuses this sample: {answer['refused']}")
    if target is None and answer.get("text") != taken[0][1].get("text"):
        raise InputError("a guard changes this answer, so that it is not explained", "give a target")
    return taken[0][0], answer


def _seen(model: Model, whole: bool, sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """A sample as guards are shown it, with the model's own words or without."""
    if not model.converses:
        return sample
    from mmhub.generate.talks import as_said, as_sample

    return (as_sample if whole else as_said)(model, model.messages_of(sample))


def _changed_note(given: Mapping[str, Any], passed: Mapping[str, Any]) -> tuple[str, ...]:
    note = "guards have changed the sample: what they let through is explained"
    return (note,) if list(texts_of(given)) != list(texts_of(passed)) else ()


# -- labels and numbers ------------------------------------------------------------------------------------------------


def _ask_label(model: Model, batch: Batch, answer: Mapping[str, Any], target: str | None) -> Question:
    """The logit of a label; by default of the one that the model answers, or finds most probable."""
    names = _labels(model)
    best = answer["label"] if "label" in answer else max(answer["scores"], key=answer["scores"].__getitem__)
    name = best if target is None else _known(target, names)
    number = names.index(name)
    return Question(batch, answer, name, "logit", lambda bundle: model.decoder(bundle).logits[:, [number]].float())


def _labels(model: Model) -> list[str]:
    decoder: Any = model.decoder
    return list(decoder.labels.names)


def _known(target: str, names: list[str]) -> str:
    if target not in names:
        hint = did_you_mean(target, names) or f"labels: {', '.join(names[:10])}"
        raise UsageError(f"this model has no label {target!r}", hint)
    return target


def _ask_value(model: Model, batch: Batch, answer: Mapping[str, Any], target: str | None) -> Question:
    if target not in (None, "value"):
        raise UsageError(f"a regression has no target {target!r}", "leave it out: the value is explained")
    scale, shift = (float(getattr(model.decoder, name, rest)) for name, rest in (("std", 1.0), ("mean", 0.0)))
    return Question(
        batch, answer, "value", "value", lambda bundle: model.decoder(bundle).logits[:, :1].float() * scale + shift
    )


def _ask_pair(model: Model, batch: Batch, answer: Mapping[str, Any], target: str | None) -> Question:
    if target is not None:
        raise UsageError("how two inputs belong together has no other target", "leave the target out")
    if len(answer["embeddings"]) < 2:
        raise UsageError("this model tells how well two inputs belong together, and there is one", "give both")

    def cosine(bundle: Bundle) -> Tensor:
        first, second = model.decoder(bundle).logits.float().unbind(1)
        return (first * second).sum(1, keepdim=True)

    return Question(batch, answer, " and ".join(answer["embeddings"]), "cosine similarity", cosine)


def _ask_tag(model: Model, batch: Batch, answer: Mapping[str, Any], target: str | None) -> Question:
    """The logit of a word's tag; `target` is the word, or "word=tag". By default the surest word that has a name."""
    words, tags = list(answer.get("words", ())), list(answer["tags"])
    if not tags:
        raise InputError("the text has no word to explain")
    names = _labels(model)
    word, _, tag = (target or "").partition("=")
    if target is None:
        scores = answer.get("scores") or [1.0] * len(tags)
        place = max(range(len(tags)), key=lambda at: (tags[at] != "O", scores[at]))
    elif word in words:
        place = words.index(word)
    else:
        raise UsageError(
            f"the text has no word {word!r}", did_you_mean(word, words) or 'a target is "word" or "word=TAG"'
        )
    name = _known(tag, names) if tag else tags[place]
    number = names.index(name)

    def logit(bundle: Bundle) -> Tensor:
        output = model.decoder(bundle)
        starts = output.mask & (output.mask.cumsum(1) == place + 1)
        return (output.logits[..., number].float() * starts).sum(1, keepdim=True)

    return Question(batch, answer, f"{words[place] if words else place}={name}", "logit", logit)


def _ask_span(model: Model, batch: Batch, answer: Mapping[str, Any], target: str | None) -> Question:
    """The logits of start and end of the answer that was found, or of no answer."""
    if target is not None:
        raise UsageError("of a question's context the answer that was found is explained", "leave the target out")
    with torch.no_grad():
        found = model.decoder.predict(model(batch))[0]  # type: ignore[operator]
    first, last = found["tokens"] or (0, 0)

    def logits(bundle: Bundle) -> Tensor:
        both = model.decoder(bundle).logits.float()
        return (both[:, first, 0] + both[:, last, 1])[:, None]

    return Question(batch, answer, answer.get("text") or "no answer", "logit", logits)


_KINDS: dict[str, Callable[[Model, Batch, Mapping[str, Any], str | None], Question]] = {
    "classification": _ask_label,
    "multilabel": _ask_label,
    "regression": _ask_value,
    "retrieval": _ask_pair,
    "tagging": _ask_tag,
    "question-answering": _ask_span,
}


# -- texts -------------------------------------------------------------------------------------------------------------

_OTHER = "explain a model of another decoder"
_NATS = "log-probability in nats"


def _ask_hearer(model: Model, batch: Batch, answer: Mapping[str, Any], target: str | None) -> Question:
    """The log-probability of a transcript over all ways to align it (CTC; label 0 is the blank)."""
    text = str(answer["text"]) if target is None else target
    decoder: Any = model.decoder
    labels: Tensor = decoder.encode_targets([text]).to(model.device)
    labels = labels[:, labels[0] >= 0]

    def logprob(bundle: Bundle) -> Tensor:
        output = decoder(bundle)
        rows, lengths = len(output.logits), output.mask.sum(1).clamp(min=1)
        known = torch.full((rows,), labels.shape[1], device=labels.device)
        scores = output.logits.float().log_softmax(-1).transpose(0, 1)
        found = -F.ctc_loss(scores, labels.expand(rows, -1), lengths, known, reduction="none")
        return found.masked_fill(~output.mask.any(1), torch.nan)[:, None]  # nothing is heard

    return Question(batch, answer, text, _NATS, logprob)


def _ask_reader(model: Model, batch: Batch, answer: Mapping[str, Any], target: str | None) -> Question:
    """The log-probability of each token of a text, by a decoder that reads features and writes."""
    decoder: Any = model.decoder
    text = str(answer["text"]) if target is None else target
    labels: Tensor = decoder.encode_targets([text]).to(model.device)
    cut = bool((labels[0, LONGEST:] != _IGNORED).any())
    labels = labels[:, :LONGEST]
    chosen = (labels[0] != _IGNORED).nonzero().squeeze(1)
    ids = tuple(labels[0, chosen].tolist())

    def logprobs(bundle: Bundle) -> Tensor:
        rows = len(next(iter(bundle.values())).mask)
        found: Tensor = decoder.token_losses(bundle, labels.expand(rows, -1))
        return -found[:, chosen].float()

    return Question(batch, answer, text, _NATS, logprobs, ids, _texts(decoder, ids), labels, _cut_note(cut))


def _ask_writer(
    model: Model, sample: Mapping[str, Any], target: str | None, policy: Policy, wanted: Generation | None
) -> Question:
    """The log-probability of each token that a language model writes behind a prompt."""
    decoder: Any = model.language_model
    if not hasattr(decoder, "all_logits"):
        raise UsageError(f"the decoder {type(decoder).__name__} does not say what it gives to each token", _OTHER)
    batches, kept, cut = list[Batch](), list[int](), list[bool]()
    if model.converses:
        from mmhub.generate.talks import without_answer

        sample = {"messages": without_answer(model.messages_of(sample))}

    def answer_of(passed: Mapping[str, Any]) -> dict[str, Any]:
        from mmhub.generate import write

        batches.append(_prompt(model, passed, policy))

        settings = wanted or decoder.generation
        limited = settings.max_new_tokens > LONGEST
        most, least = min(settings.max_new_tokens, LONGEST), min(settings.min_new_tokens, LONGEST)
        settings = msgspec.structs.replace(settings, max_new_tokens=most, min_new_tokens=least)
        found = write(decoder, model.fused(batches[0]), settings)[0][0]
        kept.extend(found.ids)
        cut.append(limited and found.finish == "length")
        return {"text": found.text, "finish": found.finish, "score": found.score}

    passed, answer = _guarded(model, sample, policy, target, answer_of)
    if target is not None:
        ids = decoder.processor.prompt(target, policy).tolist()
        ids = ids[1:] if ids[:1] == [decoder.processor.begin_id] else ids
        kept, cut = ids[:LONGEST], [len(ids) > LONGEST]
    if not kept:
        raise UsageError("the target has no token", "give a text that the model might write")

    chosen = torch.tensor(kept, device=model.device)

    def logprobs(bundle: Bundle) -> Tensor:
        before = own_stream(bundle).lengths[:, None] - len(kept) - 1 + torch.arange(len(kept), device=model.device)
        logits: Tensor = decoder.all_logits(bundle)
        rows = torch.arange(len(logits), device=model.device)[:, None]
        scores = logits[rows, before.clamp(min=0)].float().log_softmax(-1)
        found = scores.gather(2, chosen.expand(len(logits), -1)[..., None]).squeeze(2)
        return found.masked_fill(before < 0, torch.nan)  # nothing stands before the first token

    text = answer["text"] if target is None else target
    longer = _longer(batches[0], kept)
    written = tuple(kept)
    texts, notes = _texts(decoder, written), (*_cut_note(any(cut)), *_changed_note(sample, passed))
    return Question(longer, answer, text, _NATS, logprobs, written, texts, None, notes, passed)


def _prompt(model: Model, sample: Mapping[str, Any], policy: Policy) -> Batch:
    """What a language model begins with, as a batch of one row on its device."""
    if model.converses:
        return model.collate([sample], policy).to(model.device)
    processor: Any = model.language_model.processor
    if isinstance(sample.get("text"), (list, tuple)):
        raise InputError("a language model writes on from one text, and there are several")
    ids = processor.prompt(sample.get("text") or "", policy)
    if not len(ids):
        raise InputError("the prompt is empty, and the model knows no token that begins a text", "give it a text")
    others = {name: part([sample.get(name)], policy) for name, part in model.processors.items() if name != "text"}
    return Batch(items=others | {"text": processor.pack_rows([[ids]])}, size=1).to(model.device)


def _longer(batch: Batch, ids: list[int]) -> Batch:
    """The batch whose text goes on with these ids."""
    text = batch.items["text"]
    more = torch.tensor([ids], dtype=torch.long, device=text.data.device)
    data = torch.cat([text.data, more], 1)
    items = Items(data, torch.ones_like(data, dtype=torch.bool), text.rows, text.batch)
    return replace(batch, items=batch.items | {"text": items})


def _texts(decoder: Any, ids: tuple[int, ...]) -> tuple[str, ...]:
    """What each token adds to the text."""
    texts = [decoder.processor.decode(list(ids[:end])) for end in range(len(ids) + 1)]
    stops = set(decoder.processor.stop_ids)
    alone = [decoder.processor.decode([one]) for one in ids]
    return tuple(
        "<end>" if one in stops else new or old for one, new, old in zip(ids, grown(texts), alone, strict=True)
    )


def _cut_note(cut: bool) -> tuple[str, ...]:
    return (f"only the first {LONGEST} tokens of the answer are explained",) if cut else ()
