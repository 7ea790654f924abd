"""How probable texts are to a language model: log P by the chain rule, and perplexity by token, word and byte.

Every number says what exactly it is (`definition`), for perplexities compare only where that is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmhub.batch import Items
from mmhub.data.corpus import Corpus, documents
from mmhub.data.sources import Rows
from mmhub.errors import InputError, UsageError
from mmhub.evaluation import EvalOptions, EvaluationStopped
from mmhub.interfaces import LanguageModel, Policy
from mmhub.model import Model

BATCH_TOKENS = 16_384  # padded tokens of a batch where nothing else is said
_CHUNK = 256  # tokens that a recurrent model reads at a time; changes no result

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Scored:
    """What a text is to a model: its log-probability in nats, of so many predicted tokens."""

    logprob: float
    tokens: int
    words: int  # separated by whitespace
    bytes: int  # in UTF-8
    unknown: int  # tokens that stand for words which the vocabulary lacks


def score_texts(
    model: Model,
    texts: Sequence[str],
    *,
    end: bool | None = None,
    batch_tokens: int = 0,
    policy: Policy | None = None,
) -> list[Scored]:
    """Return log P(w1) + log P(w2 | w1) + ... of each text, by the chain rule and in nats.

    `end` says whether the end of the text is part of it; None: as the model was trained. The first token is left out
    where the model has no begin token. What is longer than the model's context is read in windows that overlap by half.

    Raises:
        UsageError: it is no language model, or has no end token. InputError: a text cannot be read (`row` is set).
    """
    decoder = model.language_model
    read = [_read(decoder.processor, text, end, row, policy or Policy()) for row, text in enumerate(texts)]
    if not read:
        return []
    sizes = np.array([len(ids) for ids in read], np.int64)
    ids, numbers = np.concatenate(read).astype(np.int32), np.arange(len(read))
    corpus = Corpus(ids, np.cumsum(sizes), numbers, words=0, utf8=0, unknown=0)
    losses = _measure(model, corpus, EvalOptions(batch_size=len(read), batch_tokens=batch_tokens))
    missing = getattr(decoder.processor, "unknown_id", None)
    return [
        Scored(
            logprob=-float(loss),
            tokens=max(len(ids) - 1, 0),
            words=len(text.split()),
            bytes=len(text.encode()),
            unknown=int((ids == missing).sum()) if missing is not None else 0,
        )
        for text, ids, loss in zip(texts, read, losses, strict=True)
    ]


def measure_rows(model: Model, rows: Rows, column: str, options: EvalOptions) -> dict[str, Any]:
    """Measure a language model on the texts of a column: {"rows", "skipped", "metrics", "definition"}.

    `options.document` says what one text is, see `documents`, '' as in training; `rows` counts texts.

    Raises:
        UsageError: the options are wrong for this model. InputError: a text cannot be read (unless `options.skip`).
        EvaluationStopped: `options.stop` said so.
    """
    corpus = read_corpus(model, rows, column, options)
    return {"rows": len(corpus), "skipped": len(corpus.skipped)} | measure_corpus(model, corpus, options)


def read_corpus(model: Model, rows: Rows, column: str, options: EvalOptions) -> Corpus:
    """Read the texts of a column with the model's own tokenizer."""
    skipped: list[str] = []
    texts = documents(rows, column, options.document or model.columns.document, skipped if options.skip else None)
    processor = model.language_model.processor
    return Corpus.read(texts, processor, options.policy, where=rows.where, skip=options.skip, skipped=skipped)


def measure_corpus(model: Model, corpus: Corpus, options: EvalOptions) -> dict[str, Any]:
    """Measure a language model on texts that are read: {"metrics", "definition"}.

    The metrics: `loss` in nats a token, `perplexity` by token, word and byte, `bits_per_byte`, and the counts they are
    made of; `unknown` is the share of tokens that stand for a word which the vocabulary lacks. `definition` says in a
    few sentences what was computed. `options.window` are the most tokens that are read together, 0 for the model's
    context, and `options.stride` how many of them are new in the next window, 0 for half.

    Raises:
        UsageError: window or stride is wrong for this model. InputError: no token is predicted.
        EvaluationStopped: `options.stop` said so.
    """
    tokens = corpus.predictions
    if not tokens:
        raise InputError("no token of these texts is predicted", "give texts of two tokens or more")
    nats = math.fsum(_measure(model, corpus, options))
    if options.ranks is not None:
        nats = options.ranks.sum(nats)[0]
    metrics = {
        "loss": nats / tokens,
        "perplexity": {
            "token": _exp(nats / tokens),
            "word": _exp(nats / max(corpus.words, 1)),
            "byte": _exp(nats / max(corpus.utf8, 1)),
        },
        "bits_per_byte": nats / math.log(2) / max(corpus.utf8, 1),
        "tokens": tokens,
        "words": corpus.words,
        "bytes": corpus.utf8,
        "documents": len(corpus),
        "unknown": corpus.unknown / tokens,
    }
    return {"metrics": metrics, "definition": _definition(model.language_model, corpus, options)}


def _read(processor: Any, text: str, end: bool | None, row: int, policy: Policy) -> NDArray[np.int64]:
    """Return the ids of a text, with its end or without."""
    try:
        ids: list[int] = processor.read(text, policy).tolist()
    except InputError as error:
        error.row = row
        raise
    ends = _ends(processor)
    wanted = ends if end is None else end
    if wanted and not ends:
        if processor.end_id is None:
            raise UsageError("this model has no end token", "score without it: end=False")
        ids.append(processor.end_id)
    elif ends and not wanted:
        ids.pop()
    return np.array(ids, np.int64)


def _ends(processor: Any) -> bool:
    """Whether what `read` gives has an end token."""
    return processor.ends and processor.end_id is not None


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)


def _definition(decoder: LanguageModel, corpus: Corpus, options: EvalOptions) -> str:
    processor, (window, stride) = decoder.processor, _windows(decoder, options)
    longest = int((corpus.ends - corpus.starts).max())
    end = "the end token of each included" if _ends(processor) else "without an end token"
    said = f"loss is the mean of -log P, perplexity its exponential, over {corpus.predictions:,} tokens of "
    said += f"{len(corpus):,} document{'s' * (len(corpus) != 1)}, {end}"
    if processor.begin_id is None or (corpus.ids[corpus.starts] != processor.begin_id).any():
        said += ", the first token of each left out because nothing stands before it (its word and bytes do count)"
    if window and longest > window:
        said += f"; documents are read in windows of {window} tokens with {stride} new ones each, so that every token "
        said += f"is predicted once, from at least {window - stride} tokens before it, or all there are"
    else:
        said += "; every token is predicted from all tokens before it in its document"
    said += f". Per word the same sum is divided by {corpus.words:,} words separated by whitespace, per byte by the "
    said += f"{corpus.utf8:,} bytes of the texts in UTF-8."
    if corpus.unknown:
        said += f" {corpus.unknown:,} of the tokens stand for unknown words, which are predicted as one and the same:"
        said += " compare only with models of the same vocabulary."
    return said


@dataclass(frozen=True)
class _Call:
    """What the model reads at once: of each document a piece of its ids, whose losses count from column `first` on."""

    document: Numbers
    begin: Numbers
    end: Numbers
    first: Numbers
    continues: bool = False  # do all rows go on from the state that the same row was left in?


def _measure(model: Model, corpus: Corpus, options: EvalOptions) -> NDArray[np.float64]:
    """Return the sum of -log P of each document's tokens; where there are several ranks, this one's share of them."""
    decoder = model.language_model
    window, stride = _windows(decoder, options)
    groups = _stateful_groups(corpus, options) if decoder.stateful else _window_groups(corpus, window, stride, options)
    rank, world = (options.ranks.rank, options.ranks.world) if options.ranks is not None else (0, 1)
    shares = [[call for group in groups[r::world] for call in group] for r in range(world)]
    own, turns = shares[rank], max(len(share) for share in shares)
    spare = groups[-1][:1] * (turns - len(own)) if groups else []  # all make as many calls: sharded weights insist
    calls: Iterator[_Call] = iter(own + spare)
    losses = np.zeros(len(corpus))
    with _evaluating(model, decoder):
        for turn, call in enumerate(options.progress(calls, turns) if options.progress else calls):
            _check(options)
            found = _call(model, decoder, corpus, call, options.precision)
            if turn < len(own):
                np.add.at(losses, call.document, found)  # a document may have several windows in one call
    return losses


def _check(options: EvalOptions) -> None:
    stop = options.stop is not None and options.stop()
    if options.ranks is not None and options.ranks.several:
        stop = bool(options.ranks.sum(float(stop))[0])
    if stop:
        raise EvaluationStopped


@contextmanager
def _evaluating(model: Model, decoder: Any) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode, and what training carries on is put aside."""
    training, carried = model.training, getattr(decoder, "carried", None)
    model.eval()
    try:
        if carried is not None:
            decoder.carried = {}
        yield
    finally:
        model.train(training)
        if carried is not None:
            decoder.carried = carried


@torch.inference_mode()
def _call(
    model: Model, decoder: LanguageModel, corpus: Corpus, call: _Call, precision: torch.dtype
) -> NDArray[np.float64]:
    """Return the sum of the losses of each row."""
    place = np.arange(int((call.end - call.begin).max()))
    mask = place < (call.end - call.begin)[:, None]
    wanted = mask & (place >= call.first[:, None])
    ids = np.where(mask, corpus.ids[np.where(mask, call.begin[:, None] + place, 0)], 0).astype(np.int64)
    rows, device = len(ids), model.device
    carrying: Any = decoder
    marks = None if (wanted == mask)[:, 1:].all() else torch.from_numpy(wanted).to(device)
    continues = torch.full((rows,), call.continues, device=device) if decoder.stateful else None
    if call.continues:  # the shorter documents, which are at their end, were the last rows
        carrying.carried = {name: state[:rows] for name, state in carrying.carried.items()}
    items = Items(
        data=torch.from_numpy(ids).to(device),
        mask=torch.from_numpy(mask).to(device),
        rows=torch.arange(rows, device=device),
        batch=rows,
        marks=marks,
        continues=continues,
    )
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        losses = decoder.token_losses(model.fusion(model.encode({"text": items}, rows)))
    sums = (losses.double() * torch.from_numpy(wanted).to(device)).sum(1)
    found: NDArray[np.float64] = sums.cpu().numpy()
    return found


def _windows(decoder: LanguageModel, options: EvalOptions) -> tuple[int, int]:
    """Return the most tokens read together, 0 for no limit, and how many of them are new in each next window."""
    context = decoder.context or 0
    if decoder.stateful:
        if options.window or options.stride:
            raise UsageError("this model reads whole documents, however long", "leave window and stride out")
        return 0, 0
    window = options.window or context
    if options.window and (window < 2 or (context and window > context)):
        raise UsageError(f"the window is {window} tokens", f"it must be from 2 to {context or 'any number'}")
    stride = options.stride or max(window // 2, 1)
    if window and not 1 <= stride < window:
        raise UsageError(f"the stride is {stride} tokens", f"it must be from 1 to {window - 1}, below the window")
    if options.stride and not window:
        raise UsageError("a stride is given, but this model has no limit", "give a window, too, or leave it out")
    return window, stride


def _stateful_groups(corpus: Corpus, options: EvalOptions) -> list[list[_Call]]:
    """Documents of like length side by side, the longest first, read chunk by chunk."""
    sizes = corpus.ends - corpus.starts
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 1]
    groups = []
    for group in _cut(np.minimum(sizes[order], _CHUNK), options):
        texts = order[group]
        calls = []
        for at in range(0, int(sizes[texts[0]]) - 1, _CHUNK):
            left = texts[sizes[texts] - 1 > at]
            begin = corpus.starts[left] + at
            end = np.minimum(begin + _CHUNK + 1, corpus.ends[left])
            calls.append(_Call(left, begin, end, np.ones_like(left), continues=at > 0))
        groups.append(calls)
    return groups


def _window_groups(corpus: Corpus, window: int, stride: int, options: EvalOptions) -> list[list[_Call]]:
    """Windows of all documents, those of like length together."""
    pieces: list[tuple[int, int, int, int]] = []
    for number, (start, end) in enumerate(zip(corpus.starts.tolist(), corpus.ends.tolist(), strict=True)):
        if end - start > 1:
            pieces += ((number, *piece) for piece in _pieces(start, end, window or end - start, stride))
    document, begin, stop, first = np.array(pieces, np.int64).reshape(-1, 4).T
    order = np.argsort(begin - stop, kind="stable")
    parts = [order[part] for part in _cut((stop - begin)[order], options)]
    return [[_Call(document[part], begin[part], stop[part], first[part])] for part in parts]


def _pieces(start: int, end: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows of one document: begin, end, and the first column whose token no window before has scored."""
    done = min(start + window, end)
    yield start, done, 1
    while done < end:
        stop = min(done + stride, end)
        yield stop - window, stop, window - (stop - done)
        done = stop


def _cut(sizes: Numbers, options: EvalOptions) -> Iterator[slice]:
    """Cut sizes that fall into batches of at most so many padded tokens and rows, at least one in each."""
    limit, start = options.batch_tokens or BATCH_TOKENS, 0
    while start < len(sizes):
        count = max(min(limit // int(sizes[start]), options.batch_size), 1)
        yield slice(start, start + count)
        start += count
