"""Attribution by attention: what flows from which token to which, layer by layer, as far as the answer needs it.

Roll-out (Abnar and Zuidema, arXiv:2005.00928) multiplies attention matrices and is the same for every label. Here each
head is weighed by how much the target depends on its attention, by its gradient (after Chefer et al., arXiv:2103.15679,
who weigh each entry, which drowns in noise where attention is saturated); and what an encoder's tokens are worth to all
that stands above it is their gradient times themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmhub.batch import Encoded, Features, Items, pad_sequences
from mmhub.errors import UsageError
from mmhub.explain.pieces import FIXED, Pieces
from mmhub.explain.probe import Probe, one_item
from mmhub.explain.surfaces import Lookup, Surface

_SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}


class Attentions(TorchFunctionMode):
    """Compute attention in the open, and keep its matrices (..., heads, T, T) in `maps`."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            result, weights = _attend(*args, **kwargs)
            self.maps.append(weights)
            return result
        if func is F.multi_head_attention_forward:
            out, looked = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})
            assert looked is not None  # asked for
            self.maps.append(looked)
            return out, None
        found = func(*args, **kwargs)
        if func in _SOFTMAX and found.ndim == 4:
            self.maps.append(found)
        return found

    def square(self, tokens: int) -> list[Tensor]:
        """Return the matrices (..., heads, T, T) of one sequence of at least so many tokens that attends to itself."""
        return [one for one in self.maps if one.requires_grad and _is_square(one, tokens)]


def _is_square(weights: Tensor, tokens: int) -> bool:
    alone = math.prod(weights.shape[:-3]) == 1
    return alone and weights.shape[-1] == weights.shape[-2] >= tokens


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `F.scaled_dot_product_attention` in evaluation mode, with the weights."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(times, -3) for part in (key, value))
    scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1)
    return weights @ value, weights


@dataclass
class _Read:
    """What one item became: its tokens, and the attention matrices on the way."""

    name: str
    item: int
    features: Features
    maps: list[Tensor] = field(default_factory=list)
    shape: tuple[int, ...] = ()  # height and width of a picture


@dataclass(frozen=True)
class Flow:
    """A forward pass whose attention is known: `values` (K,), the items of encoders, and the decoder's own matrices."""

    values: Tensor
    items: tuple[_Read, ...]
    texts: tuple[Tensor, ...] = ()  # of a decoder that reads text: which places of its stream are text, (T,)
    maps: tuple[Tensor, ...] = ()

    def lacking(self) -> list[str]:
        """Return the modalities whose encoder does not attend."""
        return sorted({one.name for one in self.items if not one.maps})


def flow(probe: Probe) -> Flow:
    """Run the sample once, item by item, and keep the attention of every part.

    Raises:
        UsageError: no part attends.
    """
    model, batch = probe.model, probe.question.batch
    reads: list[_Read] = []
    features: dict[str, Encoded] = {}
    inputs: dict[str, Items] = {}
    text: Lookup | None = None
    for surface in probe.surfaces:
        if surface.name in model.encoders:
            own = [_read(probe, surface, batch.items[surface.name], n) for n in range(len(surface.x))]
            reads += own
            features[surface.name] = _packed(own, batch.items[surface.name])
        elif surface.name in batch.items:
            inputs[surface.name] = batch.items[surface.name]
            assert surface.ids is not None
            text = Lookup([(surface.ids, surface.mask, surface.x.clone().requires_grad_())])
    bundle = _looked(text, lambda: model.encode(inputs, 1, features))
    with Attentions() as seen:
        fused = model.fusion(bundle) if batch.plan is None else model.fusion(bundle, plan=batch.plan)
        values = probe.question.measure(fused)[0]
    maps: tuple[Tensor, ...] = ()
    texts: tuple[Tensor, ...] = ()
    if text is not None:
        stream = fused.get("fused", fused.get("text"))
        assert stream is not None and stream.ids is not None
        texts = (stream.ids[0] >= 0,)
        maps = tuple(seen.square(stream.ids.shape[1] - 1))
        if not maps:
            name = type(model.decoder).__name__
            raise UsageError(f"the decoder {name} does not attend, so that nothing rolls out", "use --method occlusion")
    elif not any(one.maps for one in reads):
        raise UsageError(
            f"the {' and '.join(sorted({one.name for one in reads}))} encoder does not attend over its tokens",
            "use --method occlusion or integrated-gradients",
        )
    return Flow(values, tuple(reads), texts, maps)


def _looked(text: Lookup | None, run: Any) -> Any:
    if text is None:
        return run()
    with text:
        return run()


def _read(probe: Probe, surface: Surface, items: Items, number: int) -> _Read:
    one = one_item(items, number)
    x = surface.x[number : number + 1].clone().requires_grad_()
    given = []
    if surface.ids is not None:
        given.append((one.data, one.mask, x[:, : one.data.shape[1]]))
    else:
        same = one.data.shape == items.data[number : number + 1].shape
        one = replace(one, data=(x if same else x[:, : one.data.shape[1]]).to(surface.dtype))
    with Attentions() as seen, Lookup(given):
        features = probe.model.encode_items(surface.name, one)
    features = replace(features, marks=one.marks)
    return _Read(surface.name, number, features, seen.square(features.tokens.shape[1]), tuple(x.shape[2:]))


def _packed(reads: Sequence[_Read], items: Items) -> Encoded:
    tokens = [one.features.tokens[0] for one in reads]
    if len(reads) == 1:
        return Encoded(reads[0].features, items.rows)
    padded, mask = pad_sequences(tokens)
    masks, _ = pad_sequences([one.features.mask[0] for one in reads])
    pooled = [one.features.pooled for one in reads if one.features.pooled is not None]
    marks = [one.features.marks[0] for one in reads if one.features.marks is not None]
    return Encoded(
        Features(
            padded,
            mask.to(padded.device) & masks,
            pooled=torch.cat(pooled) if pooled else None,
            marks=pad_sequences(marks)[0] if marks else None,
        ),
        items.rows,
    )


def relevance(found: Flow, number: int, last: bool) -> tuple[list[Tensor], Tensor | None]:
    """Return how much each token of each item matters to one of the numbers, (T,) each, and each place of a stream."""
    wanted = [part for one in found.items for part in (one.features.tokens, *one.maps)]
    grads = torch.autograd.grad(found.values[number], [*wanted, *found.maps], retain_graph=not last, allow_unused=True)
    taken = iter(grads)
    tokens = []
    for one in found.items:
        tokens.append(_rolled(one, next(taken), [next(taken) for _ in one.maps]))
    if not found.maps:
        return tokens, None
    rolled = _product(found.maps, list(taken))
    place = len(rolled) - (len(found.values) - number)  # the token before the one that was chosen
    place -= int(found.maps[0].shape[-1] == len(found.texts[0]))
    return tokens, rolled[place]


def _rolled(one: _Read, grad: Tensor | None, grads: list[Tensor | None]) -> Tensor:
    tokens = one.features.tokens.detach()[0].float()
    worth = tokens.new_zeros(len(tokens)) if grad is None else (grad[0].float() * tokens).sum(-1).clamp(min=0)
    worth = worth * one.features.mask[0]
    if not bool(worth.sum() > 0):
        worth = one.features.mask[0].float() / max(int(one.features.mask.sum()), 1)
    if not one.maps:
        return worth
    rolled = _product(one.maps, grads)
    size = min(len(rolled), len(worth))
    return (worth[:size] @ rolled[:size])[: len(worth)]


def _product(maps: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """Multiply layers, (..., heads, T, T) each: half of a token stays, half comes from where it attends to.

    A head counts as much as the target depends on its attention, for or against: where an answer is saturated the sign
    of a gradient is chance. Where it depends on none, all count the same.
    """
    size = maps[0].shape[-1]
    stays = torch.eye(size, device=maps[0].device)
    total = stays
    for weights, grad in zip(maps, grads, strict=True):
        if weights.shape[-1] == size and grad is not None:
            heads = weights.detach().float().flatten(0, -3)
            matters = (heads * grad.float().flatten(0, -3)).abs().sum((1, 2))
            alike = torch.full_like(matters, 1 / len(matters))
            matters = matters / matters.sum() if bool(matters.sum() > 0) else alike
            total = (stays + (matters[:, None, None] * heads).sum(0)) / 2 @ total
    return total


def attention_rollout(probe: Probe, pieces: Pieces, found: Flow) -> Tensor:
    """Return the scores of pieces, (K, P); those of modalities whose encoder does not attend are 0."""
    count = len(found.values)
    scores = torch.zeros(count, pieces.total, device=probe.inputs[0].device)
    for number in range(count):
        tokens, stream = relevance(found, number, number == count - 1)
        share = _of_media(found, tokens, stream)
        for one, worth in zip(found.items, tokens, strict=True):
            if one.maps:
                _place(pieces, found, one, worth * share, scores[number])
        if stream is not None:
            _place_text(pieces, stream, found.texts[0], scores[number])
    return scores


def _of_media(found: Flow, tokens: Sequence[Tensor], stream: Tensor | None) -> float:
    """What the items' relevance is multiplied by, so that it is what flows from their places in a stream."""
    if stream is None or not tokens:
        return 1.0
    total = sum(float(worth.sum()) for worth in tokens)
    media = float(stream[~found.texts[0][: len(stream)]].sum())
    return media / total if total else 0.0


def _place(pieces: Pieces, found: Flow, one: _Read, worth: Tensor, scores: Tensor) -> None:
    """Give tokens' relevance to the pieces of an item: one each, but for class tokens in front of a grid.

    Raises:
        UsageError: there are others than pieces, so that nobody knows where they stand.
    """
    group = next(group for group in pieces.groups if (group.modality, group.item) == (one.name, one.item))
    count = int(one.features.mask[0].sum())
    known = group.grid == grid_of(found, one.name, one.item) if group.kind == "patch" else count == len(group.numbers)
    if not known:
        what = f"where in the {one.name} the encoder's {count} tokens stand is not known"
        raise UsageError(what, "use --method occlusion or integrated-gradients")
    worth = worth[:count]
    for number, value in zip(group.numbers, worth[len(worth) - len(group.numbers) :].tolist(), strict=True):
        if number != FIXED:
            scores[number] = value


def _place_text(pieces: Pieces, stream: Tensor, is_text: Tensor, scores: Tensor) -> None:
    places = is_text.nonzero().squeeze(1).tolist()
    numbers = [number for group in pieces.groups if group.modality in ("text", "written") for number in group.numbers]
    assert len(places) - len(numbers) in (0, 1), "the last token that was written is no piece"
    for place, number in zip(places, numbers, strict=False):
        if number != FIXED and place < len(stream):
            scores[number] = stream[place]


def grid_of(found: Flow, name: str, item: int) -> tuple[int, ...] | None:
    """Return the grid of an item's tokens, class tokens left out, or how many tokens of sound there are."""
    one = next((one for one in found.items if (one.name, one.item) == (name, item)), None)
    if one is None or not one.maps:
        return None
    count = int(one.features.mask[0].sum())
    if name != "image":
        return (count,)
    side = math.isqrt(count)
    square = len(set(one.shape)) < 2 and count - side * side < side
    return (side, side) if square else None
