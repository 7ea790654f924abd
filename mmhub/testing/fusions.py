"""Checks of a fusion: its outputs are as declared, and missing modalities, other rows and padding change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from mmhub.batch import Bundle, Features, Plan
from mmhub.interfaces import Stream, own_stream
from mmhub.testing.catalogue import Check
from mmhub.testing.contract import NotApplicableError, expect
from mmhub.testing.subject import FusionSubject, ItemFusionSubject, difference, first_stray, subject_of

_RULE = "Fusion"
_BATCH = "batching never changes a result"
Order = Sequence[tuple[str, int] | None]  # what stands in a row: a token of its text, or the item of this number


def shapes(check: Check) -> None:
    """With one, two and three modalities of any width, with and without summaries, it returns every stream of
    `outputs` with the widths declared there, one row for each row of the input, right-padded, masked tokens zero."""
    subject: FusionSubject = subject_of(check)
    subject.part()
    for count in range(1, len(subject.names) + 1):
        for widths in ((12, 10, 6), (5, 7, 9)):
            for pooled in (None, 8):
                pairs = zip(subject.names[:count], widths, strict=False)
                streams = {name: subject.stream(name, width, pooled) for name, width in pairs}
                bundle = subject.bundle(streams, {name: [2, 3, 1, 0] for name in streams})
                _check_shapes(_built(subject, streams), bundle)


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
    order = list(reversed(range(len(next(iter(bundle.values())).mask))))
    with torch.no_grad():
        whole = _by_row(fusion, bundle)
        for row in order:
            gap = difference(_by_row(fusion, subject.rows(bundle, [row]))[0], whole[row])
            expect(not gap, f"alone, row {row}: {gap}", "what it gives in a batch", _BATCH)
        for row, found in zip(order, _by_row(fusion, subject.rows(bundle, order)), strict=True):
            gap = difference(found, whole[row])
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


def by_plan(check: Check) -> None:
    """Of a fusion that takes items (`by_item`): an item has `token_count` positions where the plan says, with ids of -1
    and nothing predicted; the text has the others, with its ids and what is predicted of it."""
    subject = _of_items(check)
    fusion, bundle = subject.part(), subject.inputs()
    orders = [_order(bundle, row) for row in range(len(bundle["text"].mask))]
    places = [[(part[0], place) for place, part in enumerate(order) if part] for order in orders]
    with torch.no_grad():
        fused = own_stream(fusion(bundle, plan=Plan.of(places, [name for name in bundle if name != "text"])))
    assert fused.ids is not None and fused.loss is not None
    for row, order in enumerate(orders):
        real = fused.mask[row]
        found = list(zip(fused.ids[row][real].tolist(), (fused.loss[row][real] > 0).tolist(), strict=True))
        wanted = _said(fusion, bundle, row, order)
        expect(found == wanted, f"row {row} has the ids, and predicts, {found}", f"{wanted}", "Plan")


def no_items(check: Check) -> None:
    """Of a fusion that takes items: where no row has any, and one that is fully masked stands for each modality, the
    text is as it is without, and all parameters take part in the step; other ranks may have items."""
    subject = _of_items(check)
    fusion, bundle = subject.perturbed().train(), subject.inputs()
    names = [name for name in bundle if name != "text"]
    empty = {name: replace(_emptied(bundle[name]), rows=torch.tensor([0])) for name in names}
    plan = Plan.of([[] for _ in bundle["text"].mask], names)
    fused = own_stream(fusion({"text": bundle["text"]} | empty, plan=plan))
    counts, wanted = int(fused.mask.sum()), int(bundle["text"].mask.sum())
    expect(counts == wanted, f"there are {counts} positions", f"the {wanted} of the text", "Plan")
    expect(fused.tokens.requires_grad, "nothing depends on a parameter", "gradients", "no hang on several ranks")
    fused.tokens.sum().backward()
    found = {name: p.grad for name, p in fusion.named_parameters() if p.requires_grad}
    without = [name for name, grad in found.items() if grad is None or not torch.isfinite(grad).all()]
    expect(not without, f"no finite gradient reaches {without[:3]}", "one, if zero", "no hang on several ranks")


def _of_items(check: Check) -> ItemFusionSubject:
    subject = subject_of(check)
    if not isinstance(subject, ItemFusionSubject):
        raise NotApplicableError("it takes no items, but rows")
    return subject


def _order(bundle: Bundle, row: int) -> Order:
    """Text and items of a row in turn; every second row begins with an item."""
    text: list[tuple[str, int] | None] = [None] * int(bundle["text"].mask[row].sum())
    items: list[tuple[str, int] | None] = []
    for name, features in bundle.items():
        if features.rows is not None:
            items += [(name, item) for item in (features.rows == row).nonzero().flatten().tolist()]
    one, other = (items, text) if row % 2 else (text, items)
    both = min(len(one), len(other))
    in_turn = [part for pair in zip(one[:both], other[:both], strict=True) for part in pair]
    return [*in_turn, *one[both:], *other[both:]]


def _said(fusion: Any, bundle: Bundle, row: int, order: Order) -> list[tuple[int, bool]]:
    """The id of each position, and whether it is predicted."""
    text = bundle["text"]
    assert text.ids is not None and text.loss is not None
    said = iter(zip(text.ids[row].tolist(), text.loss[row].tolist(), strict=True))
    found: list[tuple[int, bool]] = []
    for part in order:
        if part is None:
            found.append(next(said))
        else:
            name, item = part
            found += [(-1, False)] * fusion.token_count(name, int(bundle[name].mask[item].sum()))
    return found


def _emptied(items: Features) -> Features:
    """One item without a token."""
    first = items.select(torch.tensor([0]))
    return replace(first, tokens=torch.zeros_like(first.tokens), mask=first.mask & False)


def _built(subject: FusionSubject, streams: dict[str, Stream]) -> Any:
    torch.manual_seed(0)
    return subject.cls(subject.config(), streams).eval()


def _check_shapes(fusion: Any, bundle: Bundle) -> None:
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
    found = replace(features, tokens=F.pad(features.tokens, (0, 0, 0, more)), mask=F.pad(features.mask, (0, more)))
    ids = None if features.ids is None else F.pad(features.ids, (0, more), value=-1)
    return replace(found, ids=ids, loss=None if features.loss is None else F.pad(features.loss, (0, more)))


def _by_row(fusion: Any, bundle: Bundle) -> list[dict[str, torch.Tensor]]:
    """What it gives for each row, without padding."""
    out = fusion(bundle)
    found = []
    for row in range(len(next(iter(out.values())).mask)):
        real = {name: _real(out[name].select(torch.tensor([row]))) for name in fusion.outputs}
        found.append({f"{name}.{key}": tensor for name, one in real.items() for key, tensor in one.items()})
    return found


def _real(features: Features) -> dict[str, torch.Tensor]:
    found = {"tokens": features.tokens[features.mask]}
    found |= {} if features.ids is None else {"ids": features.ids[features.mask]}
    found |= {} if features.loss is None else {"loss": features.loss[features.mask]}
    return found if features.pooled is None else found | {"pooled": features.pooled}
