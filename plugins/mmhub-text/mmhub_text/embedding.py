"""Token embeddings with dropout of numbers and of whole tokens, shared by the encoders trained from scratch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.errors import UsageError


def vocabulary(size: int, processor: Any) -> int:
    """Return the number of embeddings: `size`, or as many as the tokenizer has ids if it is 0.

    Raises:
        UsageError: the tokenizer has more ids.
    """
    needed = processor.vocab_size
    if size and size < needed:
        raise UsageError(
            f"vocab_size {size} is smaller than the tokenizer's {needed} ids", "leave vocab_size out of the config"
        )
    return size or needed


def check_fractions(**fractions: float) -> None:
    """Raise ValueError for a fraction outside [0, 1)."""
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}")


class WordEmbedding(nn.Module):
    """Look up ids (N, S) -> (N, S, D); in training, tokens turn into `unknown` and numbers into zero at random."""

    def __init__(self, vocab: int, dim: int, *, dropout: float, word_dropout: float, unknown: int) -> None:
        super().__init__()
        self.dropout, self.word_dropout, self.unknown = dropout, word_dropout, unknown
        self.weight = nn.Parameter(torch.empty(vocab, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        if self.training and self.word_dropout:
            lost = torch.rand(ids.shape, device=ids.device) < self.word_dropout
            ids = ids.masked_fill(lost, self.unknown)
        return F.dropout(F.embedding(ids, self.weight), self.dropout, self.training)
