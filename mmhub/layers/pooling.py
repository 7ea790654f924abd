"""One vector for a sequence: means over real positions, an encoder's own summary, and which modalities take part."""

from __future__ import annotations

import torch
from torch import Tensor

from mmhub.batch import Features


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Average the real tokens of each row: (B, T, D), (B, T) -> (B, D); rows without a real token give zeros."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def summary(features: Features) -> Tensor:
    """Return the encoder's own summary of each row if it has one, else the mean of its real tokens."""
    return features.pooled if features.pooled is not None else masked_mean(features.tokens, features.mask)


def keep_modalities(present: Tensor, rate: float) -> Tensor:
    """Drop present modalities at `rate` in each row, always keeping one: (B, M) bool -> (B, M) bool.

    A row that would lose all its modalities keeps one drawn at random (ModDrop, Neverova et al., arXiv:1501.00102).
    """
    draws = torch.rand(present.shape, device=present.device)
    kept = present & (draws >= rate)
    last = torch.where(present, draws, -1.0).argmax(1, keepdim=True)
    spared = torch.zeros_like(present).scatter_(1, last, True) & present
    return torch.where(kept.any(1, keepdim=True), kept, spared)
