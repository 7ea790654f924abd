"""What a transformers model keeps of the tokens before, taken for a value: nothing changes a state that is kept."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)


def copied(past: Any) -> Any:
    """Return a cache of its own over the same tensors, which the library replaces and never writes to."""
    new = copy.copy(past)
    if isinstance(past, EncoderDecoderCache):
        new.self_attention_cache, new.cross_attention_cache = (
            copied(past.self_attention_cache),
            copied(past.cross_attention_cache),
        )
        new.is_updated = dict(past.is_updated)
    else:
        new.layers = [copy.copy(layer) for layer in past.layers]
    return new


def selected(past: Any, rows: Tensor, *, crossed: bool = True) -> Any:
    """Return the cache of these rows (R,), in this order; unless `crossed`, those of the source stay as they are."""
    new = copied(past)
    part = new.self_attention_cache if not crossed and isinstance(new, EncoderDecoderCache) else new
    part.reorder_cache(rows)
    return new


def is_plain(past: Any) -> bool:
    """Does it hold keys and values alone, so that `copied` and `selected` work?"""
    if isinstance(past, EncoderDecoderCache):
        return is_plain(past.self_attention_cache) and is_plain(past.cross_attention_cache)
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(past, Cache) and isinstance(past, DynamicCache) and all(type(one) in kinds for one in past.layers)
