"""Small building blocks that fusions and model plugins share: masked pooling, positions, a Transformer encoder stack.

Every block keeps the mask rule of `mmhub.batch`: padding never changes a real position, and padded outputs are zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def sinusoidal_positions(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed sine and cosine positions, (T, D), as in Vaswani et al. 2017 (arXiv:1706.03762, section 3.5)."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :dim]


def attention_mask(mask: Tensor) -> Tensor:
    """Turn a (B, T) mask into (B, 1, T, T) for SDPA; padded queries attend to themselves, or softmax yields NaN."""
    eye = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return mask[:, None, None, :] | eye


class Attention(nn.Module):
    """Multi-head self-attention over (B, T, D) with a (B, 1, T, T) bool mask."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a GELU feed-forward layer."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), mask))
        return x + self.drop(self.mlp(self.norm2(x)))


class TransformerEncoder(nn.Module):
    """A stack of pre-norm blocks with a final norm: (B, T, D), (B, T) -> (B, T, D), padded positions zero.

    Positions are the caller's business, because a set of modality summaries has none.
    """

    def __init__(self, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attend = attention_mask(mask)
        for block in self.blocks:
            x = block(x, attend)
        return self.norm(x) * mask.unsqueeze(-1).to(x.dtype)
