"""Writing without a cache: everything is read anew for each token. Slow, and what cached writing is held against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmhub.batch import Bundle, pad_sequences
from mmhub.interfaces import LanguageModel, TextDecoder, own_stream


class Recomputed:
    """A text decoder's `begin`, `step` and `select`, its state being no more than what was given and written."""

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder = decoder

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        rows = next(iter(bundle.values())).mask.shape[0]
        device = next(iter(bundle.values())).mask.device
        return self._decoder.begin(bundle)[0], (bundle, torch.zeros(rows, 0, dtype=torch.long, device=device))

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        bundle, written = state
        written = torch.cat([written, ids[:, None]], 1)
        if isinstance(self._decoder, LanguageModel):
            return self._decoder.begin(_extended(self._decoder, bundle, written))[0], (bundle, written)
        logits, inner = self._decoder.begin(bundle)
        for column in written.unbind(1):
            logits, inner = self._decoder.step(column, inner)
        return logits, (bundle, written)

    def select(self, state: Any, rows: Tensor) -> Any:
        bundle, written = state
        return {name: stream.select(rows) for name, stream in bundle.items()}, written[rows]


def _extended(decoder: LanguageModel, bundle: Bundle, written: Tensor) -> Bundle:
    """The bundle with the written ids behind each row's own tokens."""
    stream = own_stream(bundle)
    assert stream.ids is not None
    added = decoder.embed(written)
    tokens = [torch.cat([row[real], new]) for row, real, new in zip(stream.tokens, stream.mask, added, strict=True)]
    ids = [torch.cat([row[real], new]) for row, real, new in zip(stream.ids, stream.mask, written, strict=True)]
    padded, mask = pad_sequences(tokens)
    mask = mask.to(padded.device)
    longer = replace(stream, tokens=padded, mask=mask, ids=pad_sequences(ids)[0].masked_fill(~mask, -1))
    return {"fused": longer}
