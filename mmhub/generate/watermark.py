"""The watermark of written texts: SynthID's tournaments, by transformers' functions, while drawing and when asked.

Letters in shapes: R rows that are being written, V vocabulary, K candidates, L tokens, G n-grams, D rounds.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import replace
from torch import Tensor

from mmhub.errors import InputError, PluginError, UsageError
from mmhub.interfaces import LanguageProcessor, Policy, Watermark

if TYPE_CHECKING:
    from mmhub.model import Model

KEY = "MMHUB_WATERMARK_KEY"
_TABLE = 2**16  # entries of the table that turns hashes into bits
_SEEN = 4096  # contexts that are remembered, so that none is used twice


class Mark:
    """The marks of rows that are being written, which never depend on each other.

    The first `ngram` - 1 tokens of a text are not marked, nor is one whose context has come before in it: so each bit
    of the key's stream is used once, and what is written is distributed as without a mark.
    """

    def __init__(self, settings: Watermark, rows: int, device: torch.device) -> None:
        settings = _with_key(settings)
        self._settings, self._library = settings, _library(settings, device)
        self._rounds = _rounds(settings, device)
        self._written = torch.zeros(rows, 0, dtype=torch.long, device=device)  # (R, L), the last `ngram` - 1 tokens
        self._seen = torch.zeros(rows, 0, dtype=torch.long, device=device)  # (R, L), hashes of contexts

    def __call__(self, scores: Tensor) -> Tensor:
        """Return scores (R, V), -inf for tokens that may not be drawn, as the tournaments leave them."""
        if self._written.shape[1] < self._settings.ngram - 1:
            return scores
        start = torch.ones(len(scores), dtype=torch.long, device=scores.device)
        context = self._library.accumulate_hash(start, self._written)  # (R,)
        fresh = ~(self._seen == context[:, None]).any(1)
        self._seen = torch.cat((self._seen, context[:, None]), 1)[:, -_SEEN:]
        count = max(1, int(torch.isfinite(scores).sum(1).max()))
        kept, ids = scores.topk(count) if count <= scores.shape[1] // 2 else (scores, _all_ids(scores))
        hashes = self._library.accumulate_hash(context[:, None], ids[..., None]) % _TABLE  # (R, K)
        chances = kept.softmax(1)
        for bits in self._rounds:
            won = bits[hashes]
            chances = chances * (1 + won - (won * chances).sum(1, keepdim=True))
        marked = torch.where(fresh[:, None], chances.log(), kept)
        return scores.scatter(1, ids, marked)

    def take(self, ids: Tensor) -> None:
        """Count the chosen ids, (R,), as written."""
        self._written = torch.cat((self._written, ids[:, None]), 1)[:, -(self._settings.ngram - 1) :]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self._written, self._seen = self._written[list(rows)], self._seen[list(rows)]


@functools.lru_cache(maxsize=4)
def _rounds(settings: Watermark, device: torch.device) -> Tensor:
    """Which tokens win the rounds, (D, table size) of 0 and 1, by the hash of the token behind its context.

    The library's hashes are products and sums whose lowest bits depend on the lowest bits alone, of which the table has
    as many entries: what a key adds to a hash can be known of all of them once, instead of at each token.
    """
    library = _library(settings, device)
    hashes = torch.arange(_TABLE, device=device)[None, :, None]  # (1, table size, 1)
    bits: Tensor = library.sample_g_values(library.accumulate_hash(hashes, library.keys[None, None, :, None]))
    return bits[0].T.float().contiguous()


def _all_ids(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)


@dataclass(frozen=True)
class Detection:
    """Is a text marked?

    `tokens` are the text's, `scored` those that can hold a mark: not the first few, nor one whose context came before.
    `z` says by how many standard deviations the rounds were won more often than by chance, `p` how probable that is
    without a mark.
    """

    marked: bool
    p: float
    z: float
    tokens: int
    scored: int


def detect(
    model: Model, texts: Sequence[str], watermark: Watermark | None = None, *, false_positives: float = 0.01
) -> list[Detection]:
    """Say of each text whether it was written with `watermark`, by default the model's own, by its tokenizer alone.

    A text counts as marked where one without a mark would seem so with a probability below `false_positives`. Rounds
    are weighed as in the paper, from 10 for the first to 1 for the last.

    Raises:
        UsageError: the model writes no text, or there is no key. InputError: a text cannot be read; `row` is set.
    """
    from mmhub.generate.samples import text_decoder

    decoder = text_decoder(model)
    settings = _with_key(watermark or decoder.generation.watermark or Watermark())
    library = _library(settings, torch.device("cpu"))
    return [_detect(library, settings, ids, false_positives) for ids in _tokens(decoder.processor, texts)]


def _tokens(processor: LanguageProcessor, texts: Sequence[str]) -> list[Tensor]:
    """The ids of each text, (L,), without what the tokenizer puts around it."""
    around = len(processor.prompt("", Policy()))
    found = []
    for row, text in enumerate(texts):
        try:
            found.append(processor.prompt(text, Policy())[around:].long())
        except InputError as error:
            error.row = row
            raise
    return found


def _detect(library: Any, settings: Watermark, ids: Tensor, false_positives: float) -> Detection:
    if len(ids) < settings.ngram:
        return Detection(False, 1.0, 0.0, len(ids), 0)
    rounds = library.compute_g_values(ids[None])[0].double()  # (G, D)
    fresh = library.compute_context_repetition_mask(ids[None])[0]
    rounds = rounds[fresh]
    weights = torch.linspace(10, 1, settings.depth, dtype=torch.double)
    spread = math.sqrt(len(rounds) * float((weights**2).sum()) / 4)
    z = float(((rounds - 0.5) * weights).sum()) / spread
    p = 0.5 * math.erfc(z / math.sqrt(2))
    return Detection(p < false_positives, p, z, len(ids), len(rounds))


def _with_key(settings: Watermark) -> Watermark:
    """Take the environment's key where there is no other.

    Raises:
        UsageError: there is none.
    """
    key = settings.key or os.environ.get(KEY, "")
    if not key:
        raise UsageError("the watermark has no key", f"set {KEY}, or give one with --watermark")
    return replace(settings, key=key)


def _library(settings: Watermark, device: torch.device) -> Any:
    """transformers' functions of SynthID with this key.

    Raises:
        PluginError: transformers is not installed.
    """
    try:
        from transformers import SynthIDTextWatermarkLogitsProcessor
    except ImportError:
        raise PluginError("watermarks need transformers, which is not installed", "pip install transformers") from None
    key = settings.key
    keys = [int.from_bytes(hashlib.sha256(f"{number} {key}".encode()).digest()[:7]) for number in range(settings.depth)]
    made: Any = SynthIDTextWatermarkLogitsProcessor(
        ngram_len=settings.ngram,
        keys=keys,
        sampling_table_size=_TABLE,
        sampling_table_seed=0,
        context_history_size=_SEEN,
        device=torch.device("cpu"),  # a GPU's generator would make another table
        skip_first_ngram_calls=True,
    )
    made.keys, made.sampling_table, made.device = made.keys.to(device), made.sampling_table.to(device), device
    return made
