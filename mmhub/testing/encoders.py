"""Checks of an encoder: shapes, masks, and that neither padding nor the rest of the batch changes a result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmhub.batch import Features
from mmhub.fusion.attention import Attention
from mmhub.interfaces import TASKS, Policy, Stream
from mmhub.model import Model
from mmhub.testing.catalogue import Check
from mmhub.testing.contract import NotApplicableError, expect
from mmhub.testing.standins import make_stand_in, stand_in_component
from mmhub.testing.subject import EncoderSubject, core, difference, first_stray, flatten, subject_of

_FEATURES = "Features"
_MASK = "one mask rule"
_BATCH = "batching never changes a result"
_COUNTS = "length and token_count"


def shapes(check: Check) -> None:
    """It returns `Features`: tokens (N, T, D) with D = dim, mask (N, T), and pooled (N, P) with P = pooled_dim exactly
    if that is set, all of floating point."""
    subject: EncoderSubject = subject_of(check)
    encoder = subject.part()
    data, mask = subject.inputs()
    with torch.no_grad():
        features = encoder(data, mask)
    expect(isinstance(features, Features), f"it returns a {type(features).__name__}", "Features", _FEATURES)
    n, shape = len(data), tuple(features.tokens.shape)
    good = len(shape) == 3 and shape[0] == n and shape[2] == encoder.dim
    expect(good, f"tokens are {shape}", f"(N, T, D) = ({n}, T, {encoder.dim})", _FEATURES)
    expect(features.tokens.is_floating_point(), f"tokens are {features.tokens.dtype}", "floating point", _FEATURES)
    wanted = None if encoder.pooled_dim is None else (n, encoder.pooled_dim)
    found = None if features.pooled is None else tuple(features.pooled.shape)
    expect(found == wanted, f"pooled is {found}", f"{wanted}, as pooled_dim says", _FEATURES)


def mask(check: Check) -> None:
    """The mask is bool, (N, T), right-padded with at least one real token an item; masked tokens are zero."""
    subject: EncoderSubject = subject_of(check)
    encoder = subject.part()
    data, real = subject.inputs()
    with torch.no_grad():
        features = encoder(data, real)
    kind, shape = features.mask.dtype, tuple(features.mask.shape)
    expect(kind == torch.bool, f"the mask is {kind}", "torch.bool", _MASK)
    expect(shape == tuple(features.tokens.shape[:2]), f"the mask is {shape}", "(N, T) as the tokens", _MASK)
    expect(bool(features.mask.any(1).all()), "an item has no real token", "at least one", _MASK)
    expect(_is_right_padded(features.mask), "padding stands before real tokens", "right padding", _MASK)
    padded = features.tokens[~features.mask]
    stray = first_stray(features) if padded.any() else ""
    expect(not stray, f"masked tokens are not zero: {stray}", "zeros", _MASK)


def token_count(check: Check) -> None:
    """`Processor.length` says how many real positions an input has, `token_count` how many real tokens it becomes;
    mmhub batches by both before it reads anything."""
    subject: EncoderSubject = subject_of(check)
    encoder = subject.part()
    processor = encoder.processor
    for row, (raw, item) in enumerate(zip(subject.raws(), subject.items(processor), strict=True)):
        data, real = processor.pack([item])
        length, positions = processor.length(raw, Policy()), int(real.sum())
        expect(length == positions, f"length of input {row} is {length}", f"{positions}, as packed", _COUNTS)
        with torch.no_grad():
            tokens = int(encoder(data, real).mask.sum())
        counted = encoder.token_count(positions)
        expect(counted == tokens, f"token_count({positions}) is {counted}", f"{tokens}, as encoded", _COUNTS)


def padding_invariance(check: Check) -> None:
    """If `padding_invariant`, padding an item further, or beside a longer one, changes none of its tokens."""
    subject: EncoderSubject = subject_of(check)
    encoder = _invariant(subject)
    processor = encoder.processor
    items = sorted(subject.items(processor), key=len)
    with torch.no_grad():
        alone = encoder(*processor.pack(items[:1]))
        beside = encoder(*processor.pack([items[0], items[-1]]))
        gap = _row_gap(beside, 0, alone, 0)
        expect(not gap, f"beside a longer item, {gap}", "the tokens it has alone", _BATCH)
        data, real = processor.pack(items[:1])
        if data.shape[1:2] != real.shape[1:2]:
            return  # positions are no dimension of the data: pictures
        for more in (1, 7):
            wide = data.new_zeros(1, data.shape[1] + more, *data.shape[2:])
            wide[:, : data.shape[1]] = data
            padded = encoder(wide, torch.nn.functional.pad(real, (0, more)))
            gap = _row_gap(padded, 0, alone, 0)
            expect(not gap, f"padded by {more}, {gap}", "the tokens it has unpadded", _BATCH)


def padding_garbage(check: Check) -> None:
    """If `padding_invariant`, what stands in padded input positions changes nothing."""
    subject: EncoderSubject = subject_of(check)
    encoder = _invariant(subject)
    data, real = subject.inputs()
    if data.shape[1:2] != real.shape[1:2]:
        raise NotApplicableError("positions are no dimension of its data")
    garbage = data.clone()
    garbage[~real] = data[real].max()
    with torch.no_grad():
        gap = difference(flatten(encoder(garbage, real)), flatten(encoder(data, real)))
    expect(not gap, f"with garbage where the mask is False, {gap}", "the same outputs", _MASK)


def batch_invariance(check: Check) -> None:
    """An item alone gives what it gives in a batch, and the order of items does not matter."""
    subject: EncoderSubject = subject_of(check)
    encoder = subject.part()
    data, real = subject.inputs()
    with torch.no_grad():
        batch = encoder(data, real)
        for row in range(len(data)):
            gap = _row_gap(batch, row, encoder(data[row : row + 1], real[row : row + 1]), 0)
            expect(not gap, f"in a batch, item {row}: {gap}", "what it gives alone", _BATCH)
        turned = encoder(data.flip(0), real.flip(0))
        for row in range(len(data)):
            gap = _row_gap(turned, len(data) - 1 - row, batch, row)
            expect(not gap, f"in another order, item {row}: {gap}", "what it gave before", _BATCH)


def missing_rows(check: Check) -> None:
    """In a model it serves no samples at all, and batches in which some or all samples lack its modality."""
    subject: EncoderSubject = subject_of(check)
    encoder = subject.part()
    raw = subject.raws()[0]
    alone = subject.model(encoder)
    with torch.no_grad():
        expect(alone.predict([]) == [], "predict([]) answers something", "[]", "predict")
        empty = alone.encode({subject.modality: encoder.processor([None, None], Policy())}, 2)[subject.modality]
        expect(not empty.mask.any(), "a missing item has real tokens", "none", _MASK)
        model, other = _with_another(subject, encoder)
        cases: dict[str, list[dict[str, Any]]] = {
            "all lack it": [{other: "1 2"}, {other: "3"}],
            "one lacks it": [{other: "1 2"}, {other: "3", subject.modality: raw}],
            "one has two": [{other: "1 2"}, {subject.modality: [raw, raw]}],
        }
        for what, samples in cases.items():
            vectors = model.embed(samples)
            assert isinstance(vectors, Tensor)
            good = tuple(vectors.shape) == (2, 8) and bool(torch.isfinite(vectors).all())
            expect(good, f"where {what}, the model gives {tuple(vectors.shape)}", "(2, 8), finite", "missing")


def _with_another(subject: EncoderSubject, encoder: torch.nn.Module) -> tuple[Model, str]:
    """A model of this encoder and a stand-in, joined by attention."""
    other = "numbers" if subject.modality != "numbers" else "digits"
    stand_in = make_stand_in(Stream(8))
    encoders = {subject.modality: encoder, other: stand_in}
    streams = {name: part.stream for name, part in encoders.items()}
    fusion = Attention(Attention.Config(dim=8, depth=1, heads=2), streams)  # type: ignore[arg-type]
    decoder = core("decoder", "embedding")
    cls = decoder.load()
    sources = {f"{subject.modality}_encoder": subject.component, f"{other}_encoder": stand_in_component(other)}
    sources |= {"fusion": core("fusion", "attention"), "decoder": decoder}
    made = cls(cls.Config(), fusion.outputs)
    return Model(TASKS["embedding"], encoders, fusion, made, sources).eval(), other  # type: ignore[arg-type]


def _invariant(subject: EncoderSubject) -> Any:
    encoder = subject.part()
    if not encoder.padding_invariant:
        raise NotApplicableError("padding_invariant is False: mmhub batches its items by length")
    return encoder


def _is_right_padded(real: Tensor) -> bool:
    return bool((real.long().diff(dim=1) <= 0).all())


def _row_gap(one: Features, row: int, other: Features, other_row: int) -> str:
    """How the real tokens and the summary of two rows differ, '' if they agree."""
    return difference(_real(one, row), _real(other, other_row))


def _real(features: Features, row: int) -> dict[str, Tensor]:
    found = {"tokens": features.tokens[row][features.mask[row].bool()]}
    return found if features.pooled is None else found | {"pooled": features.pooled[row]}
