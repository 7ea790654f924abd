"""What a language model reads: one stream of tokens, texts and media in the order in which they were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Plan
from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Fusion, Stream


class Interleave(Fusion):
    """Put the tokens of media, brought to the language model's width, between its own embeddings of text.

    Where they stand is said by a plan; without one, media come before the text of their row. There are no tokens that
    hold their places, so nothing can be miscounted. With text alone, that is passed on unchanged.
    """

    by_item: ClassVar[bool] = True

    class Config(ComponentConfig, frozen=True):
        """Nothing to configure."""

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if "text" not in inputs:
            raise UsageError(
                'the fusion "interleave" joins media to the text of a language model, and there is none',
                "take a language model as decoder, or another fusion, such as concat",
            )
        dim = inputs["text"].dim
        self.projectors = nn.ModuleDict(
            {name: nn.Linear(stream.dim, dim) for name, stream in inputs.items() if name != "text"}
        )
        self.reads = "tokens" if self.projectors else "nothing"
        self.outputs = {"fused": Stream(dim)}

    def forward(self, bundle: Bundle, plan: Plan | None = None, embed: Any = None) -> Bundle:
        text = bundle["text"]
        media = {name: self._projected(name, bundle[name]) for name in self.projectors}
        found = join(text, media, plan)
        for features in media.values():  # what has no item takes part in the step all the same
            if features.tokens.requires_grad and not bool(features.mask.any()):
                found.tokens = found.tokens + 0 * features.tokens.sum()
        return {"fused": found}

    def _projected(self, name: str, features: Features) -> Features:
        tokens = self.projectors[name](features.tokens) * features.mask[..., None]
        return Features(tokens, features.mask, rows=features.rows)


def join(text: Features, media: Mapping[str, Features], plan: Plan | None) -> Features:
    """Line up the tokens of a row's text (B, T, D) and of its items, (N, t, D) each, as the plan says: (B, W, D)."""
    media = {name: features for name, features in media.items() if bool(features.mask.any())}
    if not media:
        return text
    rows, device = len(text.mask), text.mask.device
    places = {name: _places(features, plan, name, rows) for name, features in media.items()}
    if plan is None:
        places = _in_front(places, media, rows)
    counts = {name: features.mask.sum(1) for name, features in media.items()}
    each = torch.zeros(rows, dtype=torch.long, device=device)
    for name, features in media.items():
        each = each.index_add(0, _rows(features), torch.ones_like(counts[name]))
    atoms = text.lengths + each  # places of each row
    shape = (rows, int(atoms.max()))
    sizes, is_item = (
        torch.zeros(shape, dtype=torch.long, device=device),
        torch.zeros(shape, dtype=torch.bool, device=device),
    )
    for name, features in media.items():
        sizes[_rows(features), places[name]] = counts[name]
        is_item[_rows(features), places[name]] = True
    is_text = ~is_item & (torch.arange(shape[1], device=device) < atoms[:, None])
    sizes[is_text] = 1
    starts = sizes.cumsum(1) - sizes
    lengths = sizes.sum(1)
    width = int(lengths.max())
    first = torch.arange(rows, device=device)[:, None] * width + starts  # where each place begins in the flat result
    where = [first[is_text]]
    parts = [text.tokens[text.mask]]
    for name, features in media.items():
        begin = first[_rows(features), places[name]]
        column = torch.arange(features.mask.shape[1], device=device)
        where.append((begin[:, None] + column)[features.mask])
        parts.append(features.tokens[features.mask].to(text.tokens.dtype))
    tokens = torch.cat([*parts, text.tokens.new_zeros(1, text.tokens.shape[2])])
    at = torch.cat(where)
    index = torch.full((rows * width,), len(tokens) - 1, dtype=torch.long, device=device)
    index[at] = torch.arange(len(at), device=device)
    joined = tokens.index_select(0, index).view(rows, width, -1)
    mask = torch.arange(width, device=device) < lengths[:, None]
    texts = where[0]

    def spread(values: Tensor | None, empty: float) -> Tensor | None:
        if values is None:
            return None
        flat = values.new_full((rows * width,), empty)
        flat[texts] = values[text.mask]
        return flat.view(rows, width)

    return Features(joined, mask, ids=spread(text.ids, -1), loss=spread(text.loss, 0))


def _rows(features: Features) -> Tensor:
    assert features.rows is not None, "media come item by item"
    return features.rows


def _places(features: Features, plan: Plan | None, name: str, rows: int) -> Tensor:
    """The place of each item, (N,) long; without a plan, its number among the items of its row."""
    own = _rows(features)
    number = torch.arange(len(own), device=own.device) - torch.searchsorted(own, own)
    return number if plan is None else plan.places[name][own, number]


def _in_front(places: Mapping[str, Tensor], media: Mapping[str, Features], rows: int) -> dict[str, Tensor]:
    """Places before the text: those of one modality behind those of another."""
    before = torch.zeros(rows, dtype=torch.long, device=next(iter(places.values())).device)
    found = {}
    for name, numbers in places.items():
        own = _rows(media[name])
        found[name] = numbers + before[own]
        before = before.index_add(0, own, torch.ones_like(own))
    return found
