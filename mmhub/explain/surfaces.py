"""What can be varied in an input: numbers that a model computes with, be they pixels, samples or token embeddings.

Token ids cannot be varied by a little, so that their embeddings are: whoever looks these ids up gets other vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmhub.batch import Items
from mmhub.errors import UsageError
from mmhub.model import Model

_NEUTRAL = ("[MASK]", "<mask>", "[UNK]", "<unk>", "<|unk|>")  # tokens that say nothing, the best first
WRITTEN = "written"
_PARTS = 64  # of a sound, among which the quietest are looked for


@dataclass
class Surface:
    """The N items of one modality as numbers, fp32: `x` (N, ...), and `origin`, the same where nothing is said.

    Of sound nothing is noise as loud as its quietest parts. `ids` (N, S) where `x` are their embeddings (N, S, D);
    `mask` (N, S) is that of the items.
    """

    name: str
    mask: Tensor
    x: Tensor
    origin: Tensor
    dtype: torch.dtype
    ids: Tensor | None = None


class Lookup(TorchFunctionMode):
    """Answer look-ups of known ids with other vectors, each surface's first one in a forward pass.

    `given` are (ids, mask, vectors (rows, S, D)); without vectors what is looked up is kept in `seen`, with a function
    that looks up other ids in the same table.
    """

    def __init__(self, given: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        super().__init__()
        self._given = list(given)
        self.seen: dict[int, tuple[Tensor, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding:
            return func(*args, **kwargs)
        asked = args[0] if args else kwargs["input"]
        for number, (ids, mask, vectors) in enumerate(self._given):
            if number not in self.seen and _same(asked, ids, mask):
                found = func(*args, **kwargs)
                self.seen[number] = (found, lambda other: func(other, *args[1:], **kwargs))
                if vectors is None:
                    return found
                flat = vectors if asked.numel() == ids.numel() else vectors[mask]
                return flat.reshape(found.shape).to(found.dtype)
        return func(*args, **kwargs)


def _same(asked: Tensor, ids: Tensor, mask: Tensor) -> bool:
    """Are these the ids, with whatever stands at padding, or those of them that are real?"""
    if asked.dtype not in (torch.long, torch.int32):
        return False
    if asked.numel() == ids.numel():
        return bool(((asked.reshape(ids.shape) == ids) | ~mask).all())
    return asked.numel() == int(mask.sum()) and torch.equal(asked.flatten().long(), ids[mask])


def surface_of(model: Model, name: str, items: Items) -> Surface:
    """Return the surface of items that are no token ids."""
    encoder: Any = model.readers[name]
    data = items.data
    if not data.is_floating_point():
        data = encoder.normalise(data) if hasattr(encoder, "normalise") else data.float()
    x = data.detach().float()
    return Surface(name, items.mask, x, _nothing(x, items), data.dtype)


def _nothing(x: Tensor, items: Items) -> Tensor:
    """A picture in its median colour, or what is heard where nothing is said: zeros are no sound that a front end has
    ever met, and of a picture that is 0 everywhere layer norms make whatever little is added to it."""
    if is_spectrum(items):
        return x.amin(dim=(1, 2), keepdim=True).expand_as(x)
    if x.ndim == 4 and items.mask.shape[1] == 1:
        return x.flatten(2).median(2).values[..., None, None].expand_as(x)
    origin = torch.zeros_like(x)
    if x.ndim == 2:
        draw = torch.Generator().manual_seed(0)
        for row, sound, real in zip(origin, x, items.mask, strict=True):
            noise = torch.randn(int(real.sum()), generator=draw).to(x.device)
            row[: len(noise)] = noise * floor_of(sound[: len(noise)])
    return origin


def floor_of(sound: Tensor) -> Tensor:
    """The loudness (root mean square) that a tenth of the 64 parts of a sound does not exceed."""
    parts = sound[: len(sound) // _PARTS * _PARTS].view(_PARTS, -1) if len(sound) >= 8 * _PARTS else sound[None]
    return parts.square().mean(1).sqrt().quantile(0.1)


def is_spectrum(items: Items) -> bool:
    """Are the items frames of bands (N, M, S)? Their lowest value, not zero, is silence."""
    return items.data.ndim == 3 and items.mask.shape[1] == items.data.shape[2]


def embedded(name: str, ids: Tensor, mask: Tensor, seen: tuple[Tensor, Any] | None, processor: Any) -> Surface:
    """Return the surface of token ids that were looked up.

    Raises:
        UsageError: they were not, as far as anyone can tell.
    """
    if seen is None:
        what = f"how the {name} of this model is turned into vectors is not known"
        raise UsageError(what, "give one text, or a model whose tokens are looked up by torch's embedding")
    found, look_up = seen
    nothing = neutral_id(processor)
    vectors = _spread(found.detach().float(), ids, mask)
    origin = torch.zeros_like(vectors)
    if nothing is not None:
        with torch.no_grad():
            origin = origin + look_up(torch.full_like(ids[:1, :1], nothing)).float().reshape(-1)
    return Surface(name, mask, vectors, origin, found.dtype, ids)


def _spread(found: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    width = found.shape[-1]
    if found.numel() == ids.numel() * width:
        return found.reshape(*ids.shape, width)
    return found.new_zeros(*ids.shape, width).index_put((mask,), found.reshape(-1, width))


def neutral_id(processor: Any) -> int | None:
    """Return the id of a token that says nothing, None where the tokenizer has none."""
    tokenizer = getattr(processor, "tokenizer", None)
    known = () if tokenizer is None else (tokenizer.token_to_id(name) for name in _NEUTRAL)
    found = next((one for one in known if one is not None), None)
    return found if found is not None else getattr(processor, "unknown_id", getattr(processor, "pad_id", None))
