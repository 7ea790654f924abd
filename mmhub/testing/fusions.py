"""Checks of a fusion: its outputs are as declared, and missing modalities, other rows and padding change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from mmhub.batch import Bundle, Features
from mmhub.interfaces import Stream
from mmhub.testing.catalogue import Check
from mmhub.testing.contract import expect
from mmhub.testing.standins import random_features, rows_of
from mmhub.testing.subject import FusionSubject, difference, first_stray, subject_of

_RULE = "Fusion"
_BATCH = "batching never changes a result"


def shapes(check: Check) -> None:
    """With one, two and three modalities of any width, with and without summaries, it returns every stream of
    `outputs` with the widths declared there, one row for each row of the input, right-padded, masked tokens zero."""
    subject: FusionSubject = subject_of(check)
    subject.part()
    for count in range(1, len(subject.names) + 1):
        for widths in ((12, 10, 6), (5, 7, 9)):
            for pooled in (None, 8):
                streams = {n: Stream(w, pooled) for n, w in zip(subject.names[:count], widths, strict=False)}
                _check_shapes(_built(subject, streams), streams)


def missing(check: Check) -> None:
    """Rows that lack a modality, or all of them, give finite features, and new streams keep one always-valid token."""
    subject: FusionSubject = subject_of(check)
    fusion, bundle = subject.part(), subject.inputs()
    with torch.no_grad():
        out = fusion(bundle)
    for name in fusion.outputs:
        for key, tensor in (("tokens", out[name].tokens), ("pooled", out[name].pooled)):
            finite = tensor is None or bool(torch.isfinite(tensor).all())
            expect(finite, f"{name}.{key} is not finite where a modality is missing", "finite numbers", _RULE)
        empty = (~out[name].mask.bool().any(1)).nonzero().flatten().tolist()
        valid = _is_passed_on(out[name], bundle) or not empty
        expect(valid, f"{name} has no real token in rows {empty}", "one that is always valid", _RULE)


def missing_leak(check: Check) -> None:
    """What stands in the features of a missing modality, and in masked tokens, changes nothing."""
    subject: FusionSubject = subject_of(check)
    fusion, bundle = subject.part(), subject.inputs()
    dirty = {name: _with_garbage(features) for name, features in bundle.items()}
    with torch.no_grad():
        clean, found = subject.run(fusion, bundle), subject.run(fusion, dirty)
        passed_on = {name for name, features in fusion(dirty).items() if _is_passed_on(features, dirty)}
    own = {key: tensor for key, tensor in found.items() if key.rpartition(".")[0] not in passed_on}
    gap = difference(own, {key: clean[key] for key in own})
    expect(not gap, f"with garbage where the mask is False, {gap}", "the same outputs", "one mask rule")


def batch_invariance(check: Check) -> None:
    """A row alone gives what it gives in a batch, and the order of rows does not matter."""
    subject: FusionSubject = subject_of(check)
    fusion, bundle = subject.part(), subject.inputs()
    count = len(next(iter(bundle.values())).mask)
    with torch.no_grad():
        whole = subject.run(fusion, bundle)
        for row in range(count):
            gap = difference(subject.run(fusion, rows_of(bundle, [row])), _rows(whole, [row]))
            expect(not gap, f"alone, row {row}: {gap}", "what it gives in a batch", _BATCH)
        order = list(reversed(range(count)))
        gap = difference(subject.run(fusion, rows_of(bundle, order)), _rows(whole, order))
        expect(not gap, f"in another order, {gap}", "the same rows", _BATCH)


def padding_invariance(check: Check) -> None:
    """Padding the tokens of its inputs changes no real token and no summary."""
    subject: FusionSubject = subject_of(check)
    fusion, bundle = subject.part(), subject.inputs()
    padded = {name: _padded(features, 3) for name, features in bundle.items()}
    with torch.no_grad():
        before, after = fusion(bundle), fusion(padded)
    for name in fusion.outputs:
        gap = difference(_real(after[name]), _real(before[name]))
        expect(not gap, f"with more padding, {name}: {gap}", "the same real tokens", _BATCH)


def _built(subject: FusionSubject, streams: dict[str, Stream]) -> Any:
    torch.manual_seed(0)
    return subject.cls(subject.config(), streams).eval()


def _check_shapes(fusion: Any, streams: dict[str, Stream]) -> None:
    bundle = {name: random_features(s, [2, 3, 1, 0], seed) for seed, (name, s) in enumerate(streams.items())}
    with torch.no_grad():
        out = fusion(bundle)
    for name, stream in fusion.outputs.items():
        expect(name in out, f"the bundle holds {sorted(out)}", f"{name!r}, as outputs says", _RULE)
        features = out[name]
        shape, pooled = tuple(features.tokens.shape), features.pooled
        good = len(shape) == 3 and shape[0] == 4 and shape[2] == stream.dim
        expect(good, f"{name}: tokens are {shape}", f"(4, T, {stream.dim}), as outputs says", _RULE)
        good = features.mask.dtype == torch.bool and tuple(features.mask.shape) == shape[:2]
        expect(good, f"{name}: the mask is {features.mask.dtype}", "(B, T) bool", "one mask rule")
        found = None if pooled is None else tuple(pooled.shape)
        wanted = None if stream.pooled is None else (4, stream.pooled)
        expect(found == wanted, f"{name}: pooled is {found}", f"{wanted}, as outputs says", _RULE)
        right = bool((features.mask.long().diff(dim=1) <= 0).all())
        expect(right, f"{name}: padding stands before real tokens", "right padding", "one mask rule")
        padded = features.tokens[~features.mask]
        stray = first_stray(features) if padded.any() else ""
        expect(not stray, f"{name}: masked tokens are not zero: {stray}", "zeros", "one mask rule")


def _is_passed_on(features: Features, bundle: Bundle) -> bool:
    """Is it one of the streams the fusion was given, whatever it is called now?"""
    return any(features is given for given in bundle.values())


def _with_garbage(features: Features) -> Features:
    tokens = features.tokens.masked_fill(~features.mask[..., None], 9.0)
    pooled = features.pooled
    return replace(
        features, tokens=tokens, pooled=None if pooled is None else pooled.masked_fill(_absent(features), 9.0)
    )


def _absent(features: Features) -> torch.Tensor:
    return ~features.mask.any(1, keepdim=True)


def _padded(features: Features, more: int) -> Features:
    return replace(features, tokens=F.pad(features.tokens, (0, 0, 0, more)), mask=F.pad(features.mask, (0, more)))


def _rows(outputs: dict[str, torch.Tensor], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    return {name: tensor[list(rows)] for name, tensor in outputs.items()}


def _real(features: Features) -> dict[str, torch.Tensor]:
    found = {"tokens": features.tokens[features.mask]}
    return found if features.pooled is None else found | {"pooled": features.pooled}
